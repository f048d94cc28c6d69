"""TLS by the flags a user has: the development CA, each command as a client, `bagel serve` as a server."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bagel.cli import main
from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.launcher import is_serving
from bagel.rpc.transport import Host, Security, sync_channel
from bagel_gateway.settings import tls_of
from tests.cli.test_serve import SINGLE_STAGE, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT_S = 60
LATE_S = 0.5
SERVICE = "bagel.v1.KvBlocksService"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that deploy/dev-ca has filled; `other` in it is a second CA's."""
    folder = tmp_path_factory.mktemp("ca")
    make(folder, "gateway=bagel.example", "client")
    make(folder / "other", "client")
    return folder


def make(folder: Path, *names: str) -> None:
    subprocess.run([sys.executable, ROOT / "deploy/dev-ca", folder, *names], check=True, timeout=LIMIT_S)


def flags(folder: Path, name: str | None, trusted: Path | None = None) -> list[str]:
    """TLS flags of a holder of that certificate, and of a client without any (None)."""
    own = [] if name is None else ["--tls-certificate", str(folder / f"{name}.pem"), "--tls-key", key(folder, name)]
    return [*own, "--tls-ca", str((trusted or folder) / "ca.pem")]


def key(folder: Path, name: str) -> str:
    return str(folder / f"{name}-key.pem")


def security(folder: Path, name: str) -> Security:
    return Security(folder / f"{name}.pem", folder / f"{name}-key.pem", folder / "ca.pem")


@contextmanager
def hosted(secure: Security, *, ready: bool = True) -> Iterator[str]:
    """A service with that TLS in a thread of its own; its address."""
    begun: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        host, ended = Host("127.0.0.1:0", [SERVICE], secure), asyncio.Event()
        await host.start()
        if ready:
            await host.ready()
        begun.set_result((f"127.0.0.1:{host.port}", asyncio.get_running_loop(), ended))
        await ended.wait()
        await host.server.stop(0)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, run())
        address, loop, ended = begun.result(LIMIT_S)
        try:
            yield address
        finally:
            loop.call_soon_threadsafe(ended.set)
            running.result(LIMIT_S)


def test_the_development_ca_keeps_its_keys_from_others_and_stays_when_run_again(ca: Path) -> None:
    before = (ca / "ca.pem").read_bytes()
    make(ca, "late")
    assert (ca / "ca.pem").read_bytes() == before
    assert {key.stat().st_mode & 0o077 for key in ca.glob("*-key.pem")} == {0}
    checked = ["openssl", "verify", "-CAfile", str(ca / "ca.pem"), str(ca / "late.pem")]
    assert subprocess.run(checked, capture_output=True, timeout=LIMIT_S).returncode == 0


def test_health_is_told_to_who_holds_a_certificate_of_the_ca(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hosted(security(ca, "gateway")) as address:
        asked = ["health", "--endpoint", address, "--timeout", "2"]
        assert main([*asked, *flags(ca, "client")]) == 0
        assert capsys.readouterr().out == "SERVING\n"
        assert main([*asked, *flags(ca, None)]) == 1, "no certificate"
        assert main([*asked, *flags(ca / "other", "client", trusted=ca)]) == 1, "of another CA"
        assert main([*asked, *flags(ca, "client", trusted=ca / "other")]) == 1, "who does not trust the service"
        assert main(asked) == 1, "plaintext"
        none, foreign, distrusting, plaintext = capsys.readouterr().err.splitlines()
        assert "it asks for our certificate; give --tls-certificate and --tls-key" in none
        assert "it does not take --tls-certificate" in foreign
        assert "its certificate is not of --tls-ca" in distrusting
        assert "speaks TLS; give --tls-ca" in plaintext


def test_health_of_a_service_that_is_loading_is_no_success(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hosted(security(ca, "gateway"), ready=False) as address:
        assert main(["health", "--endpoint", address, *flags(ca, "client")]) == 1
    assert "is NOT_SERVING" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("health", "--endpoint"),
        ("generate --prompts x --tls-ca ca.pem", "add --endpoint"),
        ("eval-nano --tls-ca ca.pem", "add --endpoint"),
        ("generate --prompts x --endpoint 127.0.0.1:1 --tls-key k.pem", "--tls-certificate"),
        ("generate --prompts x --endpoint 127.0.0.1:1 --tls-ca /nowhere.pem", "/nowhere.pem"),
        ("serve --tls-ca ca.pem", "--tls-certificate"),
        ("serve --tls-certificate /nowhere.pem --tls-key /nowhere.pem", "/nowhere.pem"),
    ],
)
def test_flags_that_do_not_fit_are_told_in_one_line(
    command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bagel: error:") and told in error


def test_a_gateway_can_ask_services_for_certificates_and_callers_for_none(ca: Path) -> None:
    stages = ["--thinker", "thinker-0=thinker:1", "--dit", "dit-0=dit:1"]
    both = tls_of(GatewayConfig.read([*stages, *flags(ca, "gateway")]))
    assert both.front == both.inner == security(ca, "gateway")
    open_front = tls_of(GatewayConfig.read([*stages, *flags(ca, "gateway"), "--tls-any-client"]))
    assert open_front.front.ca is None and open_front.inner == both.inner
    front_alone = tls_of(GatewayConfig.read([*stages, *flags(ca, "gateway"), "--plaintext-services"]))
    assert front_alone.inner == Security() and front_alone.front == both.inner
    with hosted(open_front.front) as address:
        assert is_serving(address, 5, Security(ca=ca / "ca.pem"))


@pytest.mark.slow
def test_serve_with_mutual_tls_answers_generate_and_nobody_without_certificate(ca: Path, tmp_path: Path) -> None:
    with serving(*SINGLE_STAGE, "--log-dir", str(tmp_path), *flags(ca, "gateway")) as (process, address):
        asked = [sys.executable, "-m", "bagel.cli", "generate", "--endpoint", address, "--prompts", "a"]
        asked += ["--modality", "text2text", "--max-tokens", "3"]
        env = os.environ | {"BAGEL_MODEL": ""}

        def run(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*asked, *more], cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)

        told = run(*flags(ca, "client"))
        assert told.returncode == 0 and told.stdout, told.stderr
        refused = run(*flags(ca, None))
        assert refused.returncode == 2 and "it asks for our certificate" in refused.stderr
        assert run().returncode == 2
        process.terminate()
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize(("name", "trusted"), [("bagel.example", True), ("elsewhere.example", False)])
def test_a_certificate_is_for_its_names_alone(ca: Path, name: str, trusted: bool) -> None:
    credentials = security(ca, "client").channel_credentials()
    assert credentials is not None
    options = (("grpc.ssl_target_name_override", name),)
    with (
        hosted(security(ca, "gateway")) as address,
        grpc.secure_channel(address, credentials, options=options) as called,
    ):
        ready = grpc.channel_ready_future(called)
        with nullcontext() if trusted else pytest.raises(grpc.FutureTimeoutError):
            ready.result(LIMIT_S if trusted else 2)
        ready.cancel()


def test_a_peer_that_takes_its_time_over_the_handshake_is_waited_for(ca: Path) -> None:
    with hosted(security(ca, "gateway")) as address, slow_relay(address, LATE_S) as slow:
        with sync_channel(slow, security(ca, "client")) as called:
            stub = health_pb2_grpc.HealthStub(called)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)  # fails at once if connecting fails
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@contextmanager
def slow_relay(address: str, late_s: float) -> Iterator[str]:
    """Relays a connection to the address, what comes back late_s later."""
    host, _, port = address.rpartition(":")

    def pump(source: socket.socket, target: socket.socket, late_s: float) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                time.sleep(late_s)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def relay(listening: socket.socket) -> None:
        client, _ = listening.accept()
        with client, socket.create_connection((host, int(port))) as there, ThreadPoolExecutor(1) as back:
            back.submit(pump, there, client, late_s)
            pump(client, there, 0)

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        relayed = pool.submit(relay, listening)
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        relayed.result(LIMIT_S)
