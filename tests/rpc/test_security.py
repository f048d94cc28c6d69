"""Who may call whom: certificates by name, on every hop, over real sockets; and TLS files that cannot be used."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bagel.arguments import for_command_line
from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import ConfigError, Forbidden
from bagel.pipelines import BAGEL
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.security import DIT, GATEWAY, THINKER
from bagel.rpc.transport import PLAINTEXT, Host, Security, channel
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from bagel_gateway.backend import Address
from bagel_gateway.backends import Backends
from bagel_gateway.settings import Tls, tls_of
from tests.gateway_stages import deployment, front
from tests.rpc.test_transport import SERVICE, through

ROOT = Path(__file__).parents[2]
CLIENTS = {THINKER: (GATEWAY, DIT), DIT: (GATEWAY,)}
"""Whom each service takes calls of, by default."""
PAST = datetime(2001, 1, 1, tzinfo=UTC)
STAGES = ["--thinker", "thinker-0=127.0.0.1:1", "--dit", "dit-0=127.0.0.1:2"]

Issue = Callable[..., Security]


@pytest.fixture(scope="module")
def issue(tmp_path_factory: pytest.TempPathFactory) -> Issue:
    """Makes the TLS of somebody with a certificate for some names, all of one CA."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(folder / "ca.pem")

    def make(*names: str, common_name: str | None = None, clients: tuple[str, ...] = (), **how: Any) -> Security:
        issued = authority.issue_cert(*names, common_name=common_name, **how)
        stem = "-".join((*names, common_name or "none", *how)).replace(":", ".")
        certificate, key = folder / f"{stem}.pem", folder / f"{stem}-key.pem"
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(certificate)
        return Security(certificate, key, folder / "ca.pem", clients=clients)

    return make


def service(issue: Issue, role: str) -> Security:
    """As a service of that role has it: its name, and where it is called."""
    return issue(role, "localhost", "127.0.0.1", clients=CLIENTS.get(role, ()))


async def called(port: int, security: Security, server_name: str | None = None) -> int | str:
    """What a service's method answers to who has that certificate; the name of the status if it does not."""
    async with channel(f"127.0.0.1:{port}", security, server_name) as connection:
        try:
            return (await KvBlocksServiceStub(connection).GetStats(kv_pb2.GetStatsRequest(), timeout=9)).leases
        except grpc.RpcError as error:
            return error.code().name


async def healthy(port: int, security: Security) -> bool:
    async with channel(f"127.0.0.1:{port}", security) as connection:
        answer = await health_pb2_grpc.HealthStub(connection).Check(health_pb2.HealthCheckRequest(), timeout=9)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def reflected(port: int, security: Security) -> str:
    """The status of a reflection call."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with channel(f"127.0.0.1:{port}", security) as connection:
        call = reflection_pb2_grpc.ServerReflectionStub(connection).ServerReflectionInfo(iter([request]), timeout=9)
        try:
            assert [answer async for answer in call]
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize("role", [THINKER, DIT])
def test_a_service_is_called_by_those_whose_certificate_names_them_and_checked_by_anyone(
    issue: Issue, role: str
) -> None:
    async def work(host: Host) -> None:
        for caller in (GATEWAY, THINKER, DIT):
            may = caller in CLIENTS[role]
            assert await called(host.port, service(issue, caller)) == (7 if may else "PERMISSION_DENIED"), caller
        user = issue("client")
        assert await called(host.port, user) == "PERMISSION_DENIED"
        assert await called(host.port, issue("elsewhere", common_name=GATEWAY)) == 7, "named by its common name"
        assert await called(host.port, issue("Gateway")) == 7, "names of hosts have no case"
        assert await called(host.port, issue("gateway.example")) == "PERMISSION_DENIED", "a whole name, no part of one"
        assert await healthy(host.port, user)
        assert await reflected(host.port, user) == "PERMISSION_DENIED"
        assert await reflected(host.port, service(issue, GATEWAY)) == "OK"
        no_certificate = Security(ca=user.ca)
        assert await called(host.port, no_certificate) == "UNAVAILABLE"

    through(work, service(issue, role))


def test_the_refused_are_told_whose_calls_are_taken(issue: Issue) -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}", issue("client")) as connection:
            with pytest.raises(grpc.RpcError) as caught:
                await KvBlocksServiceStub(connection).GetStats(kv_pb2.GetStatsRequest(), timeout=9)
        told = from_rpc_error(caught.value, "it")
        assert isinstance(told, Forbidden) and "is for client;" in str(told) and "gateway, dit" in str(told)

    through(work, service(issue, THINKER))


def test_a_service_without_names_to_allow_is_called_by_any_certificate_of_its_ca(issue: Issue) -> None:
    async def work(host: Host) -> None:
        assert await called(host.port, issue("client")) == 7

    through(work, service(issue, GATEWAY))


@pytest.mark.parametrize(("role", "expected"), [(THINKER, DIT), (DIT, THINKER), (GATEWAY, DIT), ("client", THINKER)])
def test_a_certificate_of_one_service_does_not_serve_as_another(issue: Issue, role: str, expected: str) -> None:
    async def work(host: Host) -> None:
        caller = service(issue, GATEWAY)
        assert await called(host.port, caller, role) == 7
        assert await called(host.port, caller, expected) == "UNAVAILABLE"

    through(work, issue(role, "localhost", "127.0.0.1"))


def test_the_gateway_asks_a_service_for_the_certificate_of_its_role_or_the_name_it_is_given(
    issue: Issue, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(host: Host) -> None:
        at = Address("thinker-0", f"127.0.0.1:{host.port}")
        reasons: dict[str, str] = {}
        for name in ("", "thinker", "dit", "localhost"):
            names = {"thinker-0": name} if name else {}
            backends = Backends(BAGEL, [at], [], security=service(issue, GATEWAY), server_names=names)
            await backends.thinkers[0].check()
            reasons[name] = backends.thinkers[0].why_not
            await backends.close()
        served = (
            "does not know the call"  # the host has no Describe: who gets as far as that has accepted the certificate
        )
        assert all((served in reason) == (name != "dit") for name, reason in reasons.items()), reasons
        assert "cannot be reached" in reasons["dit"]  # callers are told no more than that; the log is
        logged = [str(getattr(record, "fields", {}).get("details")) for record in caplog.records]
        assert any("must be for 'dit', see --tls-server-name" in details for details in logged)

    caplog.set_level(logging.INFO)
    through(work, service(issue, THINKER))


def test_a_ca_alone_is_no_tls_of_a_server(issue: Issue) -> None:
    alone = Security(ca=issue("client").ca)
    assert alone.encrypted and not alone.serves_tls
    with pytest.raises(ConfigError, match=r"tls_ca alone.*tls_certificate and tls_key"):
        Host("127.0.0.1:0", [SERVICE], alone)


@pytest.mark.parametrize("module", ["bagel_thinker", "bagel_dit", "bagel_gateway"])
def test_no_service_starts_with_a_ca_alone(module: str, issue: Issue) -> None:
    stages = STAGES if module == "bagel_gateway" else ["--model", str(ROOT / "models/nano")]
    command = [sys.executable, "-m", module, "--listen", "127.0.0.1:0", *stages, "--tls-ca", str(issue("client").ca)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert ended.returncode == 2 and "listening" not in ended.stdout
    [told] = ended.stderr.splitlines()
    assert told.startswith("error: --tls-ca alone") and "--tls-certificate" in told


def gateway(*arguments: str) -> Tls:
    return tls_of(GatewayConfig.read([*STAGES, *arguments]))


def tls(security: Security) -> list[str]:
    files = {"certificate": security.certificate, "key": security.key, "ca": security.ca}
    return [argument for what, file in files.items() for argument in (f"--tls-{what}", str(file))]


def test_a_gateway_says_what_is_tls_and_what_is_not(issue: Issue) -> None:
    own = issue(GATEWAY)
    shown = gateway().shown()
    assert (shown["tls"], shown["tls_to_services"], shown["tls_clients"]) == (False, False, "not asked")
    shown = gateway(*tls(own), "--tls-allow-client", "alice").shown()
    assert (shown["tls"], shown["tls_to_services"], shown["tls_clients"]) == (True, True, ["alice"])
    behind = gateway("--tls-ca", str(own.ca), "--plaintext-front")
    assert behind.front == PLAINTEXT and behind.inner == Security(ca=own.ca)
    assert (behind.shown()["tls"], behind.shown()["tls_to_services"]) == (False, True)
    named = gateway(*tls(own), "--tls-server-name", "thinker-0=a.example")
    assert named.server_names == {"thinker-0": "a.example"} and named.front.clients == ()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--tls-ca CA", "--plaintext-front if only the services speak TLS"),
        ("--tls-any-client", "--tls-any-client"),
        ("--tls-allow-client alice", "--tls-allow-client needs --tls-ca"),
        ("ALL --tls-any-client --tls-allow-client alice", "exclude each other"),
        ("ALL --tls-any-client --plaintext-services", "--tls-any-client"),
        ("--plaintext-front", "--plaintext-front"),
        ("ALL --plaintext-front --plaintext-services", "--plaintext-front"),
        ("ALL --plaintext-front --tls-allow-client alice", "--plaintext-front"),
        ("ALL --tls-server-name thinker-9=x", "there is dit-0, thinker-0"),
        ("--tls-server-name thinker-0=x", "--tls-server-name needs TLS"),
    ],
)
def test_flags_of_a_gateway_that_mean_nothing_together_are_refused(flags: str, told: str, issue: Issue) -> None:
    own = issue(GATEWAY)
    given = [each for word in flags.split() for each in ({"ALL": tls(own), "CA": [str(own.ca)]}.get(word) or [word])]
    with pytest.raises(ConfigError) as refused:
        gateway(*given)
    assert told in for_command_line(refused.value)


def test_files_that_cannot_be_used_are_told_by_their_flag(issue: Issue, tmp_path: Path) -> None:
    own, other, late = issue(GATEWAY), issue("other"), issue("late", not_after=PAST)
    assert own.certificate and own.key and own.ca and other.key
    damaged, locked = tmp_path / "damaged.pem", tmp_path / "locked.pem"
    damaged.write_bytes(Path(own.certificate).read_bytes().replace(b"M", b"?", 3))
    openssl = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(own.key), "-out", str(locked)]
    subprocess.run(openssl, check=True, capture_output=True, timeout=60)
    expired = tmp_path / "expired.pem"
    trustme.CA().cert_pem.write_to_path(expired)
    for serve in (True, False):
        for security, told in (
            (Security(own.key, own.certificate), "--tls-certificate and --tls-key are swapped"),
            (Security(own.certificate, other.key), r"--tls-key .* is not the key of --tls-certificate"),
            (Security(own.certificate, own.certificate), "--tls-key .* holds no PEM private key"),
            (Security(damaged, own.key), "--tls-certificate .* is damaged"),
            (Security(own.certificate, locked), "--tls-key .* encrypted"),
            (Security(late.certificate, late.key), "--tls-certificate .* expired"),
            (Security(own.certificate, own.key, own.key), "--tls-ca .* holds no PEM certificate"),
            (Security(own.certificate, own.key, own.certificate), "--tls-ca .* no certificate of an authority"),
            (Security(own.certificate, own.key, tmp_path / "none"), "none"),
        ):
            with pytest.raises(ConfigError) as caught:
                security.server_credentials() if serve else security.channel_credentials()
            message = for_command_line(caught.value)
            assert re.search(told, message) and "\n" not in message
    assert own.server_credentials() is not None and own.channel_credentials() is not None


def test_a_command_line_names_flags_and_leaves_paths_alone() -> None:
    message = "tls_key tls_key.pem is not the key of tls_certificate /a/tls_certificate"
    told = "--tls-key tls_key.pem is not the key of --tls-certificate /a/tls_certificate"
    assert for_command_line(ConfigError(message, "tls_key", "tls_certificate")) == told
    assert for_command_line(ConfigError(message)) == message


def test_a_certificate_to_call_with_alone_cannot_serve(tmp_path: Path) -> None:
    make = [sys.executable, str(ROOT / "deploy/dev-ca"), str(tmp_path), "client", "thinker-1=10.0.0.5"]
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    held = {name: Security(tmp_path / f"{name}.pem", tmp_path / f"{name}-key.pem", tmp_path / "ca.pem")
            for name in ("client", "thinker-1")}  # fmt: skip
    assert held["client"].channel_credentials() is not None
    with pytest.raises(ConfigError, match=r"tls_certificate .*purpose"):
        held["client"].server_credentials()

    async def work(host: Host) -> None:
        assert await called(host.port, held["client"], THINKER) == 7, "the role is in the name of a second one"

    through(work, held["thinker-1"])
    refused = subprocess.run([*make[:3], "alice=10.0.0.5"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "only a service has hosts" in refused.stderr


def test_a_refused_call_is_not_read_first(issue: Issue) -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}", issue("client")) as connection:
            call: Any = connection.stream_unary(f"/{SERVICE}/GetStats")()
            async with asyncio.timeout(9):
                assert await call.code() is grpc.StatusCode.PERMISSION_DENIED, "though no request was sent"

    through(work, service(issue, THINKER))


def test_https_takes_requests_of_allowed_names_alone_and_probes_of_any_certificate(issue: Issue) -> None:
    async def asked(port: int, path: str, security: Security) -> bytes:
        trusts = ssl.create_default_context(cafile=security.ca)
        if security.certificate is not None:
            trusts.load_cert_chain(security.certificate, security.key)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusts)
        with closing(writer):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            return await reader.read()

    async def run() -> None:
        own = replace(issue(GATEWAY, "127.0.0.1"), clients=("alice",))
        async with asyncio.timeout(60), deployment(http="127.0.0.1:0", **front(own)) as made:
            assert made.gateway.rest is not None
            port, bob = made.gateway.rest.port, issue("bob")
            assert (await asked(port, "/v1/models", issue("alice"))).startswith(b"HTTP/1.1 200 ")
            assert (await asked(port, "/v1/models", issue("x", common_name="Alice"))).startswith(b"HTTP/1.1 200 ")
            for path in ("/v1/models", "/metrics", "/", "/healthz/../v1/models"):
                refused = await asked(port, path, bob)
                assert refused.startswith(b"HTTP/1.1 403 ") and b"is for bob; " in refused, path
            assert (await asked(port, "/healthz", bob)).startswith(b"HTTP/1.1 200 ")
            with suppress(OSError):  # TLS 1.3 tells a client after its own part of the handshake, if at all
                assert not await asked(port, "/healthz", Security(ca=own.ca)), "no certificate"

    asyncio.run(run())
