"""Addresses of the inside: callers of the gateway are told names of services, the log alone where those are."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from http.client import HTTPConnection
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata

from bagel import errors
from bagel.errors import BagelError, InvalidRequest, RemoteError, SourceUnavailable
from bagel.kv.source import source_error
from bagel.rpc.errors import from_rpc_error, from_status, rpc_status_of
from bagel.v1 import common_pb2, gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from tests.gateway_stages import Deployment, deployment

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

SECRETS = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.5:50061: Failed to connect to remote host",
    "DNS resolution failed for thinker.internal:50061: C-ares status is not ARES_SUCCESS",
    "upstream connect error, remote address: [fd00::7]:50061",
)
WORDS = ("10.0.0.5", "50061", "thinker.internal", "fd00", "ipv4", "ipv6")
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def lost(code: grpc.StatusCode, details: str) -> AioRpcError:
    """What a call ends with that got no status of ours."""
    return AioRpcError(code, Metadata(), Metadata(), details=details, debug_error_string=details)


def names_nothing(error: BagelError) -> bool:
    """Whether all that goes to a caller of an error is free of addresses."""
    told = f"{error} {rpc_status_of(error).SerializeToString()!r}"
    return not any(word in told for word in WORDS)


@pytest.mark.parametrize("details", SECRETS)
@pytest.mark.parametrize("code", CODES)
def test_what_a_transport_says_between_services_is_for_the_log(code: grpc.StatusCode, details: str) -> None:
    told = from_rpc_error(lost(code, details), "thinker-0", inside=True)
    assert isinstance(told, RemoteError) and "thinker-0" in str(told) and names_nothing(told)
    broken = code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)  # which no service of ours gives
    if code is not grpc.StatusCode.CANCELLED:
        assert told.grpc_status == ("UNAVAILABLE" if broken else code.name) and details in told.for_log()["details"]
    pulled = source_error(lost(code, details), "thinker-0")
    assert "thinker-0" in str(pulled) and names_nothing(pulled)
    assert pulled.hidden == details or code is grpc.StatusCode.CANCELLED
    foreign = from_status(status_pb2.Status(code=code_pb2.ABORTED, message=details), "thinker-0", inside=True)
    assert names_nothing(foreign) and foreign.hidden == details
    assert details in str(from_rpc_error(lost(grpc.StatusCode.ABORTED, details), "my gateway"))  # of one's own call


KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BagelError)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_error_hides_leaves_no_service(kind: type[BagelError]) -> None:
    made = (
        kind("field", "told")
        if issubclass(kind, InvalidRequest)
        else RemoteError("told", "ABORTED")
        if kind is RemoteError
        else kind("told")
    )
    made.hidden = SECRETS[0]
    assert names_nothing(made) and made.for_log() == {"error": "told", "details": SECRETS[0]}
    back = from_status(rpc_status_of(made), "thinker-0", inside=True)
    assert type(back) is kind and str(back) == "told" and not back.hidden


PICTURE: dict[str, Any] = {"prompt": "a red cube", "model": "tiny"}
ASKED = (
    ("/readyz", None),
    ("/v1/models", None),
    ("/v1/images/generations", PICTURE),
    ("/v1/images/generations", PICTURE | {"stream": True}),
)


class Caller:
    """Asks a gateway by both fronts, and keeps every byte that its errors come with."""

    def __init__(self, at: Deployment) -> None:
        self._at = at
        self.told: list[str] = []

    async def ask(self) -> None:
        """Whatever a caller can ask."""
        request = common_pb2.Request(
            modality=common_pb2.MODALITY_TEXT2IMG,
            prompt=[common_pb2.Part(text=common_pb2.TextPart(text="a red cube"))],
        )
        async with grpc.aio.insecure_channel(self._at.target) as channel:
            stub = GatewayServiceStub(channel)
            call = stub.Generate(gateway_pb2.GenerateRequest(request=request))
            await self._keep(call.read)
            while not self.told:
                await self._keep(call.read)
            await self._keep(lambda: stub.DescribeModel(gateway_pb2.DescribeModelRequest()))
        assert self._at.gateway.rest is not None
        for path, body in ASKED:
            await asyncio.to_thread(self._ask_by_http, self._at.gateway.rest.address, path, body)

    def _ask_by_http(self, address: str, path: str, body: dict[str, Any] | None) -> None:
        connection = HTTPConnection(address, timeout=30)
        try:
            data, headers = (None, {}) if body is None else (json.dumps(body), {"Content-Type": "application/json"})
            connection.request("GET" if body is None else "POST", path, data, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status >= 400 or "error" in text:
                self.told.append(f"{text} {answer.headers}")
        finally:
            connection.close()

    async def _keep(self, ask: Callable[[], Awaitable[Any]]) -> None:
        try:
            await ask()
        except AioRpcError as error:
            self.told.append(f"{error.details()} {error.trailing_metadata()!r}")

    def check(self, ports: list[int], *names: str) -> None:
        """Asserts that something was told, of these services, and nothing of where they are."""
        assert len(self.told) >= 3
        assert all(any(name in told for told in self.told) for name in names), self.told
        words = ["127.0.0.1", "localhost", "ipv4", *map(str, ports)]
        assert not [told for told in self.told for word in words if word in told]


def walked(break_it: Callable[[Deployment], Awaitable[None]], *names: str, **settings: Any) -> None:
    """Breaks a deployment, and asks its gateway while it has not noticed and when it has."""

    async def run() -> None:
        async with (
            asyncio.timeout(60),
            deployment(http="127.0.0.1:0", backend_timeout_s=0.2, **settings) as at,
        ):
            ports = [host.port for host in at.hosts]
            await break_it(at)
            for _ in range(2):
                caller = Caller(at)
                await caller.ask()
                caller.check(ports, *names)
                await asyncio.sleep(0.2)

    asyncio.run(run())


@pytest.mark.parametrize("which", [0, 1])
def test_a_service_that_is_gone(which: int, caplog: pytest.LogCaptureFixture) -> None:
    name = ("thinker-0", "dit-0")[which]

    async def stop(at: Deployment) -> None:
        await at.hosts[which].server.stop(0)

    with caplog.at_level(logging.INFO):
        walked(stop, name)
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    assert any("127.0.0.1:" in str(each.get("details")) for each in fields), "the log has the address"


def test_services_that_do_not_fit_and_a_source_that_is_lost() -> None:
    async def nothing(at: Deployment) -> None:
        pass

    walked(nothing, "thinker-0", "dit-0", dits=(b"l",))

    async def lose(at: Deployment) -> None:
        at.dits[0].failure = SourceUnavailable("the connection to thinker-0 broke", hidden="ipv4:127.0.0.1:1: refused")

    async def run() -> None:
        async with asyncio.timeout(60), deployment(http="127.0.0.1:0") as at:
            await lose(at)
            with pytest.raises(SourceUnavailable, match="thinker-0") as caught:
                await at.client.generate("a red cube")
            assert "ipv4" not in str(caught.value)

    asyncio.run(run())
