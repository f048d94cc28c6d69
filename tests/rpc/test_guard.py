"""What one caller can hold of a gRPC port: connections, streams, watches; and what all others still get."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bagel.errors import InvalidRequest
from bagel.rpc.errors import unary
from bagel.rpc.limits import Limits
from bagel.rpc.transport import PLAINTEXT, Host, Security, channel
from bagel.v1 import kv_pb2
from tests.rpc.test_transport import SERVICE, SERVING, add_stats, leases

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

LIMIT_S = 30
SHORT = Limits(connections=24, streams=8, watches=16, message_s=1, handshake_s=1, age_s=1)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, END_HEADERS = 1, 4, 4
NO_WINDOW = struct.pack(">HI", 4, 0)
"""The setting that a stream may send nothing."""


def bounded(work: Callable[[Host], Awaitable[None]], limits: Limits = SHORT, security: Security = PLAINTEXT) -> None:
    """Run work beside a host with those limits."""

    async def main() -> None:
        host = Host("127.0.0.1:0", [SERVICE], security, limits=limits)
        add_stats(host)
        await host.start()
        await host.ready()
        try:
            async with asyncio.timeout(LIMIT_S):
                await work(host)
        finally:
            await host.drain(0)

    asyncio.run(main())


def connected(stack: ExitStack, port: int, count: int, said: bytes = b"") -> list[socket.socket]:
    """Connections that have sent that and no more."""
    made = [stack.enter_context(closing(socket.create_connection(("127.0.0.1", port)))) for _ in range(count)]
    for each in made:
        each.sendall(said)
        each.setblocking(False)
    return made


def is_open(connection: socket.socket) -> bool:
    try:
        while connection.recv(2**16):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


async def all_closed(connections: list[socket.socket]) -> None:
    while any(map(is_open, connections)):
        await asyncio.sleep(0.1)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def test_silent_and_half_agreed_connections_are_closed_and_others_served() -> None:
    async def work(host: Host) -> None:
        with ExitStack() as stack:
            silent = connected(stack, host.port, 10)
            agreed = connected(stack, host.port, 2, PREFACE + frame(SETTINGS, 0, 0, b""))
            assert await leases(host) == 7
            await all_closed(silent + agreed)

    bounded(work, replace(SHORT, age_s=600))


def test_half_handshakes_are_closed(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")

    async def work(host: Host) -> None:
        with ExitStack() as stack:
            half = connected(stack, host.port, 10, b"\x16\x03\x01\x02\x00\x01")  # the begin of a ClientHello
            assert await leases(host, Security(ca=tmp_path / "ca.pem")) == 7
            await all_closed(half)

    bounded(work, security=Security(tmp_path / "certificate.pem", tmp_path / "key.pem"))


def test_connections_are_bounded_in_all() -> None:
    async def work(host: Host) -> None:
        with ExitStack() as stack:
            many = connected(stack, host.port, 2 * SHORT.connections)
            await asyncio.sleep(0.2)
            assert 0 < sum(map(is_open, many)) <= SHORT.connections
            await all_closed(many)
            assert await leases(host) == 7

    bounded(work)


def test_one_caller_gets_a_quarter_of_the_streams_that_may_idle_and_calls_go_on() -> None:
    async def first(call: Any) -> str:
        try:
            answer = await call.read()
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK" if answer is not aio.EOF else "ended"

    async def work(host: Host) -> None:
        watch = health_pb2.HealthCheckRequest(service=SERVICE)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async with channel(f"127.0.0.1:{host.port}") as one, channel(f"127.0.0.1:{host.port}") as other:
            calls: list[Any] = [
                health_pb2_grpc.HealthStub(each).Watch(watch) for each in (one, other) for _ in range(3)
            ]
            for each in (one, other):
                calls.append(reflection_pb2_grpc.ServerReflectionStub(each).ServerReflectionInfo())
                await calls[-1].write(ask)
            told = Counter([await first(call) for call in calls])
            assert told == {"OK": SHORT.watches // 4, "RESOURCE_EXHAUSTED": 4}
            assert await leases(host) == 7
            for call in calls:
                call.cancel()
            while await first(again := health_pb2_grpc.HealthStub(one).Watch(watch)) != "OK":
                await asyncio.sleep(0.05)  # a place is given back
            again.cancel()

    bounded(work)


def test_more_streams_than_one_connection_may_have_wait_and_others_do_not() -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}") as greedy:
            method: Any = greedy.stream_unary(f"/{SERVICE}/GetStats")
            began = time.monotonic()
            calls: list[Any] = [method() for _ in range(4 * SHORT.streams)]
            assert await leases(host) == 7
            ended = Counter([await call.code() for call in calls])
        late, refused = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE
        assert ended[late] >= SHORT.streams and ended.keys() <= {late, refused}, "none has sent its request"
        assert ended[refused] or time.monotonic() - began > 2 * SHORT.message_s, "they were not let in at once"

    bounded(work)


def test_a_call_under_way_outlives_every_bound() -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}") as one:
            call: Any = health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest())
            assert (await call.read()).status == SERVING
            await asyncio.sleep(3 * SHORT.age_s)
            await host.not_ready()
            assert (await call.read()).status != SERVING
            call.cancel()

    bounded(work)


def test_a_client_whose_connection_has_come_of_age_calls_again() -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}") as one:
            check = health_pb2_grpc.HealthStub(one).Check
            for _ in range(2):
                assert (await check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)).status == SERVING
                await asyncio.sleep(1.5 * SHORT.age_s)

    bounded(work)


def test_a_watcher_that_takes_nothing_holds_up_no_other_and_no_change() -> None:
    """The library's own servicer writes to a watcher with a lock held that all of them and `ready` need."""
    pairs = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Watch", ":authority": "x"}
    pairs |= {"te": "trailers", "content-type": "application/grpc"}
    block = b"".join(b"\0" + bytes([len(key)]) + key.encode() + bytes([len(value)]) + value.encode()
                     for key, value in pairs.items())  # fmt: skip
    said = PREFACE + frame(SETTINGS, 0, 0, NO_WINDOW) + frame(HEADERS, END_HEADERS, 1, block)
    said += frame(0, 1, 1, b"\0\0\0\0\0")

    async def work(host: Host) -> None:
        with ExitStack() as stack:
            connected(stack, host.port, 2, said)
            async with channel(f"127.0.0.1:{host.port}") as one:
                call: Any = health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest())
                assert (await call.read()).status == SERVING
                for _ in range(3):
                    await host.not_ready()
                    assert (await call.read()).status != SERVING
                    await host.ready()
                    assert (await call.read()).status == SERVING
                call.cancel()

    bounded(work, Limits())


@pytest.mark.parametrize("method", ["Check", "List", "Watch"])
def test_bytes_that_are_no_message_are_the_callers_fault(method: str) -> None:
    async def work(host: Host) -> None:
        async with channel(f"127.0.0.1:{host.port}") as one:
            called: Any = one.unary_stream(f"/grpc.health.v1.Health/{method}")
            call = called(b"\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    bounded(work)


def test_a_refused_request_is_freed_at_once() -> None:
    """gRPC keeps what a call ended with in a cycle, and the locals of the frames it passed hung from it."""

    class Refuses:
        @unary
        async def GetStats(self, request: kv_pb2.GetStatsRequest, context: object) -> kv_pb2.GetStatsResponse:
            raise InvalidRequest("request", "no")

    async def work(host: Host) -> None:
        host.methods.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Refuse": refuse}),))
        async with channel(f"127.0.0.1:{host.port}") as one:
            called: Any = one.unary_unary(f"/{SERVICE}/Refuse")
            for _ in range(5):
                with pytest.raises(grpc.RpcError):
                    await called(b"")
        await asyncio.sleep(0.1)
        assert not [each for each in gc.get_objects() if type(each) is kv_pb2.GetStatsRequest]

    refuse: Any = grpc.unary_unary_rpc_method_handler(Refuses().GetStats, kv_pb2.GetStatsRequest.FromString)
    gc.collect()
    gc.disable()
    try:
        bounded(work)
    finally:
        gc.enable()
