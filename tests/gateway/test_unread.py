"""Clients that do not read: their places are given back, what waits for them is bounded, and others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from bagel.errors import BagelError, NotRead
from bagel.rpc.transport import CHANNEL_OPTIONS
from bagel.rpc.unread import Unread
from bagel.v1 import gateway_pb2, gateway_pb2_grpc
from tests.gateway.test_service import red_cube, through, until
from tests.gateway_stages import Deployment

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

MIB = 2**20
LARGE = 3 * MIB
"""Of a picture: more than windows and buffers between two processes take."""


def with_previews() -> gateway_pb2.GenerateRequest:
    message = red_cube()
    message.partial_images = 3
    return message


@asynccontextmanager
async def lazy(at: Deployment, count: int) -> AsyncIterator[list[Any]]:
    """So many calls of a client that reads nothing, over a connection of its own."""
    alone = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(at.target, alone) as connection:
        stub = gateway_pb2_grpc.GatewayServiceStub(connection)
        yield [stub.Generate(with_previews()) for _ in range(count)]


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def hurry(at: Deployment) -> None:
    """A large message has no more time than a small one; pictures are large."""
    at.gateway.host.unread.slowest_bytes_per_s = 2**40
    at.dits[0].size = LARGE


async def rest(at: Deployment, path: str, body: dict[str, Any], window: int = 1) -> socket.socket:
    """A connection that has asked and reads nothing; its window is the smallest that there is by default."""
    assert at.gateway.rest is not None
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    asking.setblocking(False)
    loop, data = asyncio.get_running_loop(), json.dumps(body).encode()
    await loop.sock_connect(asking, ("127.0.0.1", at.gateway.rest.port))
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    await loop.sock_sendall(asking, head.encode() + b"\r\n\r\n" + data)
    return asking


def test_calls_that_are_not_read_keep_no_place_and_end() -> None:
    async def work(at: Deployment) -> None:
        hurry(at)
        async with lazy(at, 4) as calls:
            await until(lambda: len(at.dits[0].asked) == 4 and not at.gateway.admission.under_way)
            assert (await at.client.generate("another", timeout=10)).image is not None
            await until(lambda: not at.journal.open_calls)
            # Of each that has ended, what gRPC holds is left: one message.
            await until(lambda: at.gateway.host.unread.nbytes < 4 * 1.5 * LARGE)
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match="reader_timeout") as ended:
                    await read_to_the_end(call)
                assert ended.value.code() is grpc.StatusCode.ABORTED
        await until(lambda: at.gateway.host.unread.nbytes == 0)
        await at.settled()

    through(work, max_requests=4, reader_timeout_s=0.3)


def test_work_whose_reader_has_gone_quiet_is_cancelled() -> None:
    async def work(at: Deployment) -> None:
        hurry(at)
        async with lazy(at, 1):
            await until(lambda: bool(at.dits[0].asked))
            await until(lambda: "draw is cancelled" in at.journal.events)
            await at.settled()
        assert "draw ends" not in at.journal.events

    async def begun(at: Deployment) -> None:
        at.dits[0].seconds_after_picture = 1000.0
        await work(at)

    through(begun, reader_timeout_s=0.3)


def test_what_waits_in_all_is_bounded_and_the_longest_waiting_go() -> None:
    async def work(at: Deployment) -> None:
        hurry(at)
        async with lazy(at, 8) as calls:
            await until(lambda: bool(at.dits[0].asked))
            for _ in range(3):  # whoever reads is served meanwhile
                assert (await at.client.generate("another", timeout=10)).image is not None
                assert at.gateway.host.unread.nbytes <= 30 * MIB
            await until(lambda: all(call.done() for call in calls))  # their connection is broken
        await until(lambda: at.gateway.host.unread.nbytes == 0)
        await at.settled()

    through(work, max_unread_bytes=30 * MIB, max_requests=16)


def test_one_call_may_not_leave_more_than_its_share() -> None:
    async def work(at: Deployment) -> None:
        hurry(at)
        async with lazy(at, 1) as [call]:
            await until(lambda: bool(at.dits[0].asked) and not at.journal.open_calls)
            with pytest.raises(grpc.aio.AioRpcError, match="--max-unread-bytes-per-call") as ended:
                await read_to_the_end(call)
            assert ended.value.code() is grpc.StatusCode.ABORTED
        await at.settled()

    through(work, max_unread_bytes_per_call=5 * MIB)


def test_a_slow_reader_who_goes_on_reading_gets_all() -> None:
    async def work(at: Deployment) -> None:
        hurry(at)
        kinds = []
        async with lazy(at, 1) as [call]:
            while (event := await call.read()) is not grpc.aio.EOF:
                kinds.append(event.WhichOneof("event"))
                await asyncio.sleep(0.5)
        assert kinds.count("preview") == 3 and kinds[-2:] == ["picture", "finished"]

    through(work, reader_timeout_s=3.0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_http_client_that_does_not_read_loses_its_connection(stream: bool) -> None:
    async def work(at: Deployment) -> None:
        assert at.gateway.rest is not None
        at.dits[0].size = LARGE
        body = {"prompt": "a red cube", "stream": stream, **({"partial_images": 3} if stream else {})}
        silent = [await rest(at, "/v1/images/generations", body) for _ in range(2)]
        await until(lambda: len(at.dits[0].asked) == 2 and not at.gateway.admission.under_way)
        assert at.gateway.rest.answering == 2
        assert (await at.client.generate("another", timeout=10)).image is not None
        await until(lambda: at.gateway.rest is not None and not at.gateway.rest.answering)
        assert at.gateway.host.unread.nbytes == 0
        for connection in silent:
            connection.close()

    through(work, max_requests=2, reader_timeout_s=0.5, http="127.0.0.1:0")


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_http_client_who_goes_on_reading_gets_all(stream: bool) -> None:
    async def work(at: Deployment) -> None:
        at.dits[0].size = MIB
        loop, got = asyncio.get_running_loop(), b""
        asking = await rest(at, "/v1/images/generations", {"prompt": "a red cube", "stream": stream}, 32 * 1024)
        end, began = (b"\r\n0\r\n\r\n" if stream else b"}}"), time.monotonic()
        while not got.endswith(end) and (more := await asyncio.wait_for(loop.sock_recv(asking, 16 * 1024), 10)):
            got += more
            await asyncio.sleep(0.05)
        asking.close()
        assert got.endswith(end) and time.monotonic() - began > 2.0

    through(work, reader_timeout_s=1.5, http="127.0.0.1:0")


def test_of_all_that_waits_the_longest_goes_first() -> None:
    unread, gone = Unread(limit_bytes=10), list[str]()
    with unread.waiting(lambda why: gone.append("one")) as one, unread.waiting(lambda why: gone.append("two")) as two:
        one.add(4)
        two.add(4)
        one.take(1)
        two.add(2)
        assert not gone and unread.nbytes == 9
        one.add(3)
        assert gone == ["two"] and unread.nbytes == 6
        two.add(50)  # it is over
        assert unread.nbytes == 6
    assert unread.nbytes == 0


@pytest.mark.parametrize("wrong", [{"reader_timeout_s": 0}, {"reader_timeout_s": float("inf")}, {"limit_bytes": 0}])
def test_limits_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BagelError, match=r"reader_timeout|max_unread_bytes"):
        Unread(**wrong)


def test_the_error_says_what_it_is() -> None:
    assert (NotRead.grpc_status, NotRead.http_status) == ("ABORTED", 408)
