"""API keys at the gateway: nothing but probes and the playground's page without one, on either front."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai import AsyncOpenAI

from bagel.client import AsyncClient
from bagel.deployment.gateway_config import GatewayConfig
from bagel.errors import ConfigError, Unauthenticated
from bagel.rpc.api_keys import KeyRing, key_line, key_metadata, new_key, parse_keys, read_keys
from bagel.rpc.transport import PLAINTEXT, Security, channel
from bagel.telemetry.logs import JsonFormatter
from bagel.v1 import gateway_pb2
from bagel_gateway import keys as gateway_keys
from bagel_gateway.settings import exposes_keys
from tests.gateway_stages import Deployment, deployment, front
from tests.rest.test_front import IMAGES, get, raw

ALICE, BOB = new_key(), new_key()
STAGES: dict[str, Any] = {
    "thinkers": ("thinker-0=127.0.0.1:1",),
    "dits": ("dit-0=127.0.0.1:2",),
}
Work = Callable[[Deployment], Coroutine[Any, Any, None]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A key file in which Alice and Bob are known."""
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n\n{key_line('alice', ALICE)}\n{key_line('bob', BOB)}\n")
    return path


def through(file: Path, work: Work, **settings: Any) -> None:
    """Run work with a gateway that asks for keys, on both fronts."""

    async def run() -> None:
        async with asyncio.timeout(60), deployment(http="127.0.0.1:0", api_keys=file, **settings) as made:
            await work(made)

    asyncio.run(run())


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def code_of(at: Deployment, method: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
    """What a call of a method by that name ends with, whatever it takes."""
    async with channel(at.target) as connection:
        called: Any = connection.unary_unary(method)
        code: grpc.StatusCode = await called(b"", metadata=metadata, timeout=20).code()
        return code


def methods() -> Iterator[str]:
    """Every method of the services on the gateway's port."""
    for proto in (gateway_pb2, health_pb2, reflection_pb2):
        for service in proto.DESCRIPTOR.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)
    yield "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


# gRPC


def test_every_method_needs_a_key_but_what_a_health_probe_calls(file: Path) -> None:
    async def work(at: Deployment) -> None:
        known = set(methods())
        assert {"/bagel.v1.GatewayService/Generate", "/grpc.health.v1.Health/Check"} < known
        probes = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
        for method in known - probes | {"/bagel.v1.GatewayService/Later", "/no.such.Service/Method"}:
            for metadata in ((), bearer(new_key()), bearer(""), (("authorization", ALICE),), bearer(ALICE) * 2):
                assert await code_of(at, method, *metadata) == grpc.StatusCode.UNAUTHENTICATED, (method, metadata)
            assert await code_of(at, method, *bearer(ALICE)) != grpc.StatusCode.UNAUTHENTICATED, method
        async with channel(at.target) as connection:
            health = health_pb2_grpc.HealthStub(connection)
            asked = health_pb2.HealthCheckRequest()
            assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
            async for told in health.Watch(asked):
                assert told.status == health_pb2.HealthCheckResponse.SERVING
                break
        assert at.thinkers[0].asked == []

    through(file, work)


def test_a_client_with_a_key_draws_and_one_without_is_told_what_to_do(file: Path) -> None:
    async def work(at: Deployment) -> None:
        async with AsyncClient(at.target, api_key=BOB) as client:
            assert (await client.describe()).model.name == "tiny"
            assert (await client.generate("a red cube")).image is not None
        for key, told in ((None, "--api-key-file"), (new_key(), "ask whoever runs this gateway")):
            async with AsyncClient(at.target, api_key=key) as client:
                with pytest.raises(Unauthenticated, match=told):
                    await client.generate("a red cube")
                with pytest.raises(Unauthenticated, match=told):
                    await client.describe()

    through(file, work)


def test_a_refused_call_is_answered_before_its_request_has_come(file: Path) -> None:
    async def work(at: Deployment) -> None:
        async with channel(at.target) as connection:
            called: Any = connection.stream_stream("/bagel.v1.GatewayService/Generate")
            assert await called(timeout=20).code() == grpc.StatusCode.UNAUTHENTICATED

    through(file, work)


def test_reflection_works_with_a_key(file: Path) -> None:
    async def work(at: Deployment) -> None:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async with channel(at.target) as connection:
            stub = reflection_pb2_grpc.ServerReflectionStub(connection)
            answers = [each async for each in stub.ServerReflectionInfo(iter([asked]), metadata=bearer(ALICE))]
        assert "bagel.v1.GatewayService" in str(answers)

    through(file, work)


# REST


def paths(at: Deployment) -> set[tuple[str, str]]:
    """(method, path) of every route of the application, mounted ones as one of their files."""
    assert at.gateway.rest is not None
    app: Any = at.gateway.rest._server.config.app
    while not isinstance(app, FastAPI):
        app = app._app
    found = set()
    route: Any
    for route in app.routes:
        path = route.path.replace("{model:path}", "tiny")
        if hasattr(route, "methods"):
            found |= {(method, path) for method in route.methods}
        else:
            found |= {("GET", f"{path}/style.css"), ("GET", path)}
    return found


async def ask(at: Deployment, method: str, path: str, *headers: str) -> tuple[int, bytes]:
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]
    return await raw(at, "\r\n".join(head).encode())


def test_every_route_needs_a_key_but_probes_and_the_page(file: Path) -> None:
    async def work(at: Deployment) -> None:
        known = paths(at)
        assert {("POST", IMAGES), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json")} < known
        opened = {("GET", path) for path in ("/healthz", "/readyz", "/", "/playground/style.css")} | {
            ("HEAD", path) for path in ("/", "/healthz", "/readyz")
        }
        assert opened < known
        other = {("GET", "/v1/later"), ("POST", "/"), ("DELETE", "/healthz"), ("GET", "/playground"), ("GET", "//")}
        other |= {("GET", "/playground/later"), ("GET", "/playground/../metrics"), ("GET", "/%2e/metrics")}
        for method, path in known - opened | other:
            for shown in ([], [f"Authorization: Bearer {new_key()}"], [f"Authorization: Basic {ALICE}"]):
                assert (await ask(at, method, path, *shown))[0] == 401, (method, path)
            assert (await ask(at, method, path, f"authorization: bearer {ALICE}"))[0] != 401, (method, path)
        for method, path in opened:
            assert (await ask(at, method, path))[0] == 200, (method, path)

    through(file, work)


def test_openais_client_sends_its_api_key_and_gets_openais_error_without_a_known_one(file: Path) -> None:
    async def work(at: Deployment) -> None:
        assert at.gateway.rest is not None
        url = f"http://{at.gateway.rest.address}/v1"
        async with AsyncOpenAI(base_url=url, api_key=ALICE, max_retries=0) as client:
            assert (await client.images.generate(prompt="a cat")).data
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="not known here") as caught:
                await client.images.edit(image=b"x" * 3_000_000, prompt="a cat")
        error = caught.value
        assert (error.type, error.code, error.param) == ("invalid_request_error", "invalid_api_key", None)
        assert error.response.headers["www-authenticate"] == "Bearer"

    through(file, work)


def test_a_refused_request_is_answered_before_its_body_has_come(file: Path) -> None:
    async def work(at: Deployment) -> None:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert (await raw(at, f"{head}Content-Length: 10000\r\n\r\n".encode()))[0] == 401

    through(file, work)


def test_a_probe_is_not_told_of_the_services_and_nobody_of_their_addresses(file: Path) -> None:
    async def work(at: Deployment) -> None:
        for host in at.hosts:
            await host.not_ready()
        async with asyncio.timeout(10):
            while at.gateway.backends.ready:
                await asyncio.sleep(0.01)
        status, body = await get(at, "/readyz")
        assert status == 503 and b"127.0.0.1" not in body and b"dit-0" not in body
        status, body = await ask(at, "GET", "/readyz", f"Authorization: Bearer {ALICE}")
        assert status == 503 and b": not ready" in body and b"127.0.0.1" not in body

    through(file, work)


# The file while the gateway runs


def test_a_key_is_revoked_and_another_added_while_the_gateway_runs(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gateway_keys, "LOOK_EVERY_S", 0.02)
    caplog.set_level(logging.INFO)
    carol = new_key()

    async def until(at: Deployment, key: str, known: bool) -> None:
        async with AsyncClient(at.target, api_key=key) as client:
            while True:
                try:
                    await client.describe()
                    if known:
                        return
                except Unauthenticated:
                    if not known:
                        return
                await asyncio.sleep(0.01)

    async def work(at: Deployment) -> None:
        await until(at, ALICE, True)
        file.write_text(f"{key_line('bob', BOB)}\n{key_line('carol', carol)}\n")
        await until(at, ALICE, False)
        await until(at, carol, True)
        assert (await ask(at, "GET", "/metrics", f"Authorization: Bearer {ALICE}"))[0] == 401
        file.write_text("carol sha256:half")
        async with asyncio.timeout(10):
            while "cannot be read again" not in caplog.text:
                await asyncio.sleep(0.01)
        await until(at, BOB, True)
        replaced = file.with_name("new")
        replaced.write_text(key_line("alice", ALICE))
        replaced.rename(file)
        await until(at, ALICE, True)
        await until(at, BOB, False)

    through(file, work)
    changed = [record.__dict__["fields"] for record in caplog.records if record.message == "API keys changed"]
    assert changed[0] == {"known": 2, "added": ["carol"], "removed": ["alice"]}


def test_logs_of_a_request_name_the_caller_and_never_the_key(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(JsonFormatter("gateway"))
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    wrong = new_key()

    async def work(at: Deployment) -> None:
        async with AsyncClient(at.target, api_key=ALICE) as client:
            await client.generate("a red cube", request_id="by-grpc")
        assert at.gateway.rest is not None
        url = f"http://{at.gateway.rest.address}/v1"
        async with AsyncOpenAI(base_url=url, api_key=BOB, max_retries=0) as client:
            await client.images.generate(prompt="a cat", n=2, extra_headers={"x-request-id": "by-rest"})
        async with AsyncClient(at.target, api_key=wrong) as client:
            with pytest.raises(Unauthenticated):
                await client.generate("a red cube")

    caplog.set_level(logging.INFO)
    logging.getLogger().addHandler(handler)
    try:
        through(file, work)
    finally:
        logging.getLogger().removeHandler(handler)
    told = [json.loads(line) for line in lines]
    of = {each["request_id"]: each["caller"] for each in told if each["event"] == "accepted" and "caller" in each}
    assert of == {"by-grpc": "alice", "by-rest": "bob"}
    [refused] = [each for each in told if each["event"] == "refused"]
    assert refused["method"] == "/bagel.v1.GatewayService/Generate" and "127.0.0.1" in refused["peer"]
    assert not any(key in "".join(lines) for key in (ALICE, BOB, wrong))


@pytest.mark.parametrize(
    ("listen", "http", "security", "exposed"),
    [
        ("127.0.0.1:1", None, PLAINTEXT, False),
        ("[::1]:1", "localhost:2", PLAINTEXT, False),
        ("127.0.0.1:1", "0.0.0.0:2", PLAINTEXT, True),
        ("10.0.0.5:1", None, PLAINTEXT, True),
        ("10.0.0.5:1", None, Security(ca=Path("ca")), True),
        ("10.0.0.5:1", "0.0.0.0:2", Security(Path("c"), Path("k")), False),
    ],
)
def test_keys_that_come_in_plaintext_from_other_machines_are_noticed(
    listen: str, http: str | None, security: Security, exposed: bool, file: Path
) -> None:
    config = GatewayConfig(listen=listen, http=http, api_keys=file, **front(security), **STAGES)
    assert exposes_keys(config) == exposed
    assert not exposes_keys(replace(config, api_keys=None))


# The file


def test_a_key_is_long_random_and_found_by_its_prefix_and_its_line_by_sha256sum() -> None:
    assert re.fullmatch(r"bagel_[A-Za-z0-9_-]{43}", ALICE) and ALICE != BOB
    assert key_line("a-1", ALICE) == f"a-1 sha256:{hashlib.sha256(ALICE.encode()).hexdigest()}"
    ring = parse_keys(f"{key_line('alice', ALICE)}\r\n  {key_line('bob', BOB)}".encode(), "keys")
    assert (ring.name_of(ALICE.encode()), ring.name_of(BOB.encode())) == ("alice", "bob")
    assert ring.name_of(ALICE[:-1].encode()) is None and ring.name_of(b"") is None


def test_every_entry_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    digests = [hashlib.sha256(key.encode()).digest() for key in (ALICE, BOB)]
    ring = KeyRing(zip(("alice", "bob"), digests, strict=True))
    assert ring.name_of(ALICE.encode()) == "alice"
    assert compared == digests


LINE = key_line("alice", ALICE)
WRONG = [
    ("", "holds no key"),
    ("# none\n\n", "holds no key"),
    (ALICE, "line 1 is not NAME sha256:HEX"),
    (f"alice {ALICE}", "line 1 is not NAME sha256:HEX"),
    (f"{LINE}\n{LINE[:-1]}", "line 2 is not"),
    (LINE.replace("alice", "a=b"), "line 1 is not"),
    (LINE.replace("sha256", "md5"), "line 1 is not"),
    (f"{LINE}\n{key_line('alice', BOB)}", "line 2: there is a key called alice already"),
    (f"{LINE}\n{key_line('bob', ALICE)}", "line 2: the key of bob is another name's too"),
]


@pytest.mark.parametrize(("text", "told"), WRONG, ids=range(len(WRONG)))  # keys are new in every process
def test_a_file_that_cannot_be_used_is_told_without_what_may_be_a_key(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        read_keys(path)
    assert ALICE not in str(caught.value)


def test_a_file_that_is_missing_or_that_anyone_can_write_is_told(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")
    file.chmod(0o646)
    with pytest.raises(ConfigError, match="chmod o-w"):
        read_keys(file)
    file.chmod(0o444)
    assert read_keys(file)[0].names == ("alice", "bob")


def test_the_environment_names_the_file_and_nothing_is_no_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = "--thinker thinker-0=127.0.0.1:1 --dit dit-0=127.0.0.1:2".split()
    assert GatewayConfig.read(stages).api_keys is None
    monkeypatch.setenv("BAGEL_API_KEYS_FILE", str(file))
    assert GatewayConfig.read(stages).api_keys == file
    assert GatewayConfig.read([*stages, "--api-keys", "other"]).api_keys == Path("other")
    monkeypatch.setenv("BAGEL_API_KEYS_FILE", " ")
    with pytest.raises(ConfigError, match="set but empty"):
        GatewayConfig.read(stages)


# Clients


@pytest.mark.parametrize("target", ["127.0.0.1:5", "127.8.0.1:5", "localhost:5", "[::1]:5", "unix:/run/bagel"])
def test_a_key_goes_in_plaintext_within_this_machine(target: str) -> None:
    assert key_metadata(ALICE, target, PLAINTEXT) == bearer(ALICE)


@pytest.mark.parametrize("target", ["10.0.0.5:5", "gateway:5", "[fe80::1]:5", "dns:///localhost.example:5"])
def test_a_key_goes_to_other_machines_over_tls_or_a_network_that_is_trusted(target: str) -> None:
    with pytest.raises(ConfigError, match=r"--tls-ca.*--trusted-network"):
        key_metadata(ALICE, target, PLAINTEXT)
    assert key_metadata(ALICE, target, Security(ca=Path("ca.pem"))) == bearer(ALICE)
    assert key_metadata(ALICE, target, Security(trusted_network=True)) == bearer(ALICE)
    assert key_metadata(None, target, PLAINTEXT) == ()


@pytest.mark.parametrize("key", ["", "two words", "é", "line\nbreak"])
def test_what_is_no_key_is_told_without_it(key: str) -> None:
    with pytest.raises(ConfigError, match="bagel keys new"):
        key_metadata(key, "127.0.0.1:5", PLAINTEXT)
