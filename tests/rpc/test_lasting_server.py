"""A call that ends grpc.aio's server: what is under way goes on, and the port is open again."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
import pytest

from bagel.rpc.transport import Host, channel
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from tests.rpc.test_transport import leases, through

SETTINGS, HEADERS, DATA = 4, 1, 0
END_HEADERS, END_STREAM = 4, 1


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + body


def field(name: bytes, value: bytes) -> bytes:
    """A header that HPACK neither packs nor remembers."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


async def call(port: int, path: bytes) -> None:
    """Make a gRPC call, and wait until the server says something of it or ends the connection."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"localhost"}
    fields |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    headers = b"".join(field(*each) for each in fields.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
    writer.write(frame(HEADERS, END_HEADERS, 1, headers) + frame(DATA, END_STREAM, 1, bytes(5)))
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(0.5):
            while await reader.read(1 << 16):
                pass
    writer.close()


@pytest.mark.parametrize("path", [b"/bagel.v1.KvBlocksService/Ren\xcbw", b"\xff", b""])
def test_a_method_name_that_is_none_takes_nothing_down(path: bytes) -> None:
    async def work(host: Host) -> None:
        async with channel(f"localhost:{host.port}") as connection:
            stub = KvBlocksServiceStub(connection)
            under_way = stub.GetStats(kv_pb2.GetStatsRequest(), timeout=9)
            await under_way.wait_for_connection()
            for _ in range(2):  # also what was made anew
                await call(host.port, path)
                async with asyncio.timeout(9):
                    while not await answers(host):
                        await asyncio.sleep(0.02)
            assert (await under_way).leases == 7

    through(work, answer_after_s=0.5)


async def answers(host: Host) -> bool:
    with suppress(grpc.RpcError):
        return await leases(host) == 7
    return False
