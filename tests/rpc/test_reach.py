"""Why a service cannot be reached, or an address not be listened on: one line with the true cause."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme

from bagel.arguments import for_command_line
from bagel.errors import ConfigError, SourceUnavailable
from bagel.rpc.reach import check_free, unreachable
from bagel.rpc.security import Security

Serve = Callable[[Security], str]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two CAs, and the key and certificate of 127.0.0.1 and of another host."""
    folder = tmp_path_factory.mktemp("tls")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other.pem")
    for name, issued in (("here", ca.issue_cert("127.0.0.1")), ("there", ca.issue_cert("there.example"))):
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a gRPC server with such TLS; its address."""
    servers = []

    def start(security: Security) -> str:
        server = grpc.server(ThreadPoolExecutor(1), options=(("grpc.so_reuseport", 0),))
        credentials = security.server_credentials()
        at = "127.0.0.1:0"
        port = server.add_secure_port(at, credentials) if credentials else server.add_insecure_port(at)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def told(address: str, security: Security) -> str:
    return for_command_line(unreachable("gateway", address, security, 1.0))


def test_tls_and_plaintext_meet(serve: Serve, tls: Path) -> None:
    plain, secure = serve(Security()), serve(Security(tls / "here.pem", tls / "here.key"))
    ours = Security(ca=str(tls / "ca.pem"))  # a text is a path too
    assert told(secure, Security()).endswith(" speaks TLS; give --tls-ca, the CA that its certificate is of")
    assert told(plain, ours) == f"the gateway at {plain} speaks no TLS; leave --tls-ca out"
    assert told(secure, ours).endswith("listens, but does not answer in time; its log says what it does")
    assert isinstance(unreachable("gateway", secure, Security()), ConfigError)


def test_certificates_that_do_not_fit(serve: Serve, tls: Path) -> None:
    here, there = (serve(Security(tls / f"{name}.pem", tls / f"{name}.key")) for name in ("here", "there"))
    mutual = serve(Security(tls / "here.pem", tls / "here.key", tls / "ca.pem"))
    ours = Security(ca=tls / "ca.pem")
    assert f"its certificate is not of --tls-ca {tls}/other.pem" in told(here, Security(ca=tls / "other.pem"))
    assert "its certificate is for there.example, not for 127.0.0.1" in told(there, ours)
    assert "it asks for our certificate; give --tls-certificate and --tls-key" in told(mutual, ours)


def test_nothing_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = "{}:{}".format(*taken.getsockname())
        assert told(address, Security()).endswith("nothing listens there; start one with bagel serve")
    assert isinstance(unreachable("gateway", "no.such.host.invalid:1", Security()), SourceUnavailable)


def test_addresses_that_cannot_be_listened_on(serve: Serve) -> None:
    address = serve(Security())
    with pytest.raises(ConfigError, match=r"it is in use: another program.*; choose another with --port"):
        check_free(address, "--port")
    with pytest.raises(ConfigError, match="this machine has no such address"):
        check_free("192.0.2.1:50051", "--host")
    check_free("127.0.0.1:0", "--port")
