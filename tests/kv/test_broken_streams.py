"""Connections that break, or damage what passes, while K/V are pulled over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from bagel.errors import (
    SourceUnavailable,
)
from bagel.kv.puller import KvPuller
from bagel.kv.service import add_kv_blocks
from bagel.kv.store import KvStore
from bagel.rpc import transport
from tests.kv.pair import FINGERPRINT, LAYOUT, PAGES, SEGMENTS, Pair, check, fill, run


class Link:
    """A TCP link to a source which breaks after `nbytes` of K/V, in its first `times` connections.

    how "flip": a bit of the next frame's header is flipped; "reset": the connection is reset; "request": a bit of the
    digest of a segment that is asked for is flipped on its way there, and nothing breaks.
    """

    def __init__(self, port: int, how: str, times: int, nbytes: int) -> None:
        self._port, self._how, self._left, self._nbytes = port, how, times, nbytes
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._up(reader, forth))
                group.create_task(self._down(back, writer))
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()  # a reset
            forth.transport.abort()

    def mend(self) -> None:
        """Break no more."""
        self._left = 0

    async def _up(self, reader: asyncio.StreamReader, forth: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self._how == "request" and self._left and SEGMENTS[0][0] in data:
                self._left -= 1
                data = data.replace(SEGMENTS[0][0], SEGMENTS[0][0][:-1] + b"c")
            forth.write(data)
            await forth.drain()
        raise ConnectionResetError

    async def _down(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while True:
            header = await back.readexactly(9)
            payload = await back.readexactly(int.from_bytes(header[:3], "big"))
            passed += len(payload)
            if self._how != "request" and self._left and passed > self._nbytes:
                self._left -= 1
                await asyncio.sleep(0.2)  # what has passed arrives
                if self._how == "reset":
                    raise ConnectionResetError
                header = bytes((header[0] ^ 0x80,)) + header[1:]
            writer.write(header + payload)
            await writer.drain()


@asynccontextmanager
async def linked(pair: Pair, link: Link) -> AsyncIterator[Pair]:
    """The pair with a new store, which pulls through a link."""
    server = await asyncio.start_server(link, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with transport.channel(f"127.0.0.1:{port}") as through:
        puller = KvPuller(KvStore(LAYOUT, FINGERPRINT, 64 << 20), {"thinker": through}, page_timeout_s=5.0)
        try:
            yield replace(pair, here=puller.store, puller=puller)
            await puller.close()
        finally:
            server.close()


@pytest.mark.parametrize("how", ["flip", "reset"])
def test_a_stream_that_breaks_is_pulled_once_more_for_what_is_missing(how: str) -> None:
    async def test(pair: Pair) -> None:
        link = Link(pair.port, how, times=1, nbytes=3 << 19)
        async with linked(pair, link) as broken:
            ref = broken.ref()
            fill(broken.there)
            await broken.fetch(ref)
            check(broken.here)
            stats = broken.here.stats()
            assert stats.received_pages == PAGES
            assert stats.retried_pages > 0 and link.connections >= 2
            await broken.settled()

    run(test)


def test_a_request_for_kv_that_is_damaged_on_its_way_is_sent_once_more() -> None:
    """Or else its source's error would be told, that nobody has such a segment."""

    async def test(pair: Pair) -> None:
        host = transport.Host("127.0.0.1:0", ())  # as services are run, which send digests
        add_kv_blocks(pair.source, host.methods)
        await host.start()
        async with linked(pair, Link(host.port, "request", times=1, nbytes=0)) as damaged:
            ref = damaged.ref()
            fill(damaged.there)
            await damaged.fetch(ref)
            check(damaged.here)
            await damaged.settled()
        async with linked(pair, Link(host.port, "request", times=99, nbytes=0)) as damaged:
            with pytest.raises(SourceUnavailable, match="damaged on its way"):
                await damaged.fetch(damaged.ref())
            await damaged.settled()
        await host.drain(0)

    run(test)


@pytest.mark.parametrize("how", ["flip", "reset"])
def test_a_stream_that_breaks_again_fails_the_request_with_its_cause(how: str) -> None:
    async def test(pair: Pair) -> None:
        link = Link(pair.port, how, times=99, nbytes=1000)  # gRPC itself tries again what has got no answer at all
        async with linked(pair, link) as broken:
            ref = broken.ref()
            fill(broken.there)
            with pytest.raises(SourceUnavailable, match=r"thinker broke .*\((UNAVAILABLE|INTERNAL|UNKNOWN)\); the log"):
                await broken.fetch(ref)
            assert broken.here.stats().stored_bytes == 0
            link.mend()
            await broken.fetch(broken.ref())
            check(broken.here)

    run(test)
