"""K/V between two stores over real gRPC: exact, once, checked, and with nothing held when it goes wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from bagel.errors import (
    BagelError,
    ConfigError,
    ForeignContext,
    IncompleteContext,
    KvTimeout,
    LeaseLapsed,
    Loading,
    NotFinite,
    SourceUnavailable,
    StoreFull,
    UnknownSegment,
)
from bagel.kv.codec import PAGE_VERSION, decode_page
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.service import KvBlocksServicer, add_kv_blocks
from bagel.kv.store import KvStore
from bagel.rpc import transport
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub

LAYOUT = KvLayout(layers=3, kv_heads=4, head_dim=64, dtype="bfloat16")
ROWS = LAYOUT.page_tokens + 7  # two pages a layer
FINGERPRINT = b"fingerprint of tests"
OURS: dict[str, Any] = {"fingerprint": FINGERPRINT, "page_version": PAGE_VERSION}
SEGMENTS = ((b"a" * 16, ROWS), (b"b" * 16, 5))
PAGES = LAYOUT.layers * 3
Damage = Callable[[bytes, int], bytes]


class Source(KvBlocksServicer):
    """A source whose pages pass through `damage` (message, count so far) and which may fall silent after some."""

    def __init__(self, store: KvStore) -> None:
        super().__init__(store)
        self.damage: Damage = lambda data, count: data
        self.silent_after: int | None = None
        self.sent = 0

    async def _pages(self, request: kv_pb2.PullRequest) -> AsyncGenerator[bytes, None]:
        async for data in super()._pages(request):
            if self.sent == self.silent_after:
                await asyncio.sleep(3600)
            self.sent += 1
            yield self.damage(data, self.sent)


@dataclass
class Pair:
    """A source with its server, and a store that pulls from it."""

    source: Source
    server: grpc.aio.Server
    here: KvStore
    puller: KvPuller
    channel: grpc.aio.Channel
    port: int

    @property
    def there(self) -> KvStore:
        return self.source.store

    def ref(self, *segments: tuple[bytes, int], ttl_s: float = 5.0, **changes: Any) -> kv_pb2.ContextRef:
        """A context of the source, under a lease."""
        segments = segments or SEGMENTS
        lease = self.there.lease(segments, ttl_s)
        fields = {"source": "thinker", "lease_id": lease, "lease_seconds": ttl_s, **OURS}
        refs = [kv_pb2.SegmentRef(digest=digest, length=length) for digest, length in segments]
        return kv_pb2.ContextRef(segments=refs, **{**fields, **changes})

    async def fetch(self, *refs: kv_pb2.ContextRef) -> None:
        async with self.puller.hold(refs) as held:
            await held.fetch()

    async def settled(self) -> None:
        """Asserts that neither side holds anything, soon."""
        for _ in range(100):
            stats = [self.here.stats(), self.there.stats()]
            if not any(each.leases or each.pulls or each.held_bytes for each in stats):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"still held: {stats}")


def run(test: Callable[[Pair], Awaitable[None]], layout: KvLayout = LAYOUT, **options: Any) -> None:
    """Run a test against a fresh pair."""

    async def main() -> None:
        async with asyncio.timeout(20), _pair(layout, **options) as pair:
            await test(pair)

    asyncio.run(main())


@asynccontextmanager
async def _pair(layout: KvLayout, here: KvLayout | None = None, **options: Any) -> AsyncIterator[Pair]:
    source = Source(KvStore(layout, FINGERPRINT, 64 << 20))
    server = grpc.aio.server()
    add_kv_blocks(source, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        store = KvStore(here or layout, FINGERPRINT, 64 << 20)
        puller = KvPuller(store, {"thinker": channel}, **{"page_timeout_s": 5.0, **options})
        try:
            yield Pair(source, server, store, puller, channel, port)
            await puller.close()
        finally:
            await server.stop(None)


def layer_of(layout: KvLayout, digest: bytes, length: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that are a function of digest and layer."""
    generator = torch.Generator().manual_seed(digest[0] * 100 + layer)
    k, v = torch.randn(2, length, layout.kv_heads, layout.head_dim, generator=generator)
    return k.to(getattr(torch, layout.dtype)), v.to(getattr(torch, layout.dtype))


def fill(store: KvStore, *segments: tuple[bytes, int]) -> None:
    """Compute segments, as an engine does."""
    for digest, length in segments or SEGMENTS:
        assert store.claim(digest)
        for layer in range(store.layout.layers):
            store.write_layer(digest, layer, *layer_of(store.layout, digest, length, layer))


def has(store: KvStore, digest: bytes) -> bool:
    """Whether a segment is there, complete or not."""
    try:
        store.ready_pages(digest)
    except UnknownSegment:
        return False
    return True


def check(store: KvStore, *segments: tuple[bytes, int]) -> None:
    """Asserts that the segments are exactly what `fill` wrote."""
    for digest, length in segments or SEGMENTS:
        k, v = store.load(digest)
        for layer in range(store.layout.layers):
            for found, right in zip((k[layer], v[layer]), layer_of(store.layout, digest, length, layer), strict=True):
                assert torch.equal(found.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_context_arrives_exactly(dtype: str) -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        await pair.fetch(ref)
        check(pair.here)
        await pair.settled()
        there, here = pair.there.stats(), pair.here.stats()
        assert there.sent_bytes == here.received_bytes == here.stored_bytes == there.computed_bytes
        assert there.sent_pages == here.received_pages == there.computed_pages
        assert (there.computed_segments, here.retried_pages) == (2, 0)

    run(test, KvLayout(3, 4, 64, dtype))


def flipped(at: int) -> Damage:
    """Flips a bit of one byte of the message numbered `at` (from the end of it); 0: of every message."""
    return lambda data, count: data[:-1] + bytes((data[-1] ^ 1,)) if at in (0, count) else data


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


async def fails(pair: Pair, kind: type[BagelError], *words: str, refs: list[kv_pb2.ContextRef] | None = None) -> None:
    """Asserts that a fetch fails so, that nothing is held afterwards, and that the next fetch works."""
    with pytest.raises(kind) as caught:
        await pair.fetch(*(refs or [pair.ref()]))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    await pair.settled()


def test_a_flipped_byte_is_asked_for_once_more() -> None:
    async def test(pair: Pair) -> None:
        fill_later = pair.ref()
        fill(pair.there)
        pair.source.damage = flipped(2)
        await pair.fetch(fill_later)
        check(pair.here)
        assert pair.here.stats().retried_pages == 1
        await pair.settled()

    run(test)


def test_a_damaged_header_is_asked_for_once_more() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        for place in range(40):  # every field of the header
            pair.source.sent = 0
            pair.source.damage = (
                lambda data, count, at=place: (  # type: ignore[misc]
                    data[:at] + bytes((data[at] ^ 0x15,)) + data[at + 1 :] if count == 3 else data
                )
            )
            here = KvStore(LAYOUT, FINGERPRINT, 64 << 20)
            puller = KvPuller(here, {"thinker": pair.channel})
            async with puller.hold([pair.ref()]) as held:
                await held.fetch()
            check(here)
            await puller.close()
        pair.there.release([ref.lease_id])
        await pair.settled()

    run(test)


def test_a_page_damaged_twice_fails_the_request() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        pair.source.damage = flipped(0)
        await fails(pair, IncompleteContext, "segment", "layer", "checksum", "thinker", refs=[ref])
        assert pair.here.stats().stored_bytes == 0
        pair.source.damage = lambda data, count: data
        await pair.fetch(pair.ref())
        check(pair.here)
        await pair.settled()

    run(test)


def test_pages_arrive_while_the_rest_is_computed() -> None:
    async def test(pair: Pair) -> None:
        (digest, length), arrived = SEGMENTS[0], asyncio.Event()
        seen: list[tuple[bytes, int, int, int]] = []

        def on_page(*page: Any) -> None:
            seen.append(page)
            arrived.set()

        unsubscribe = pair.here.subscribe(on_page)
        fetch = asyncio.create_task(pair.fetch(pair.ref(SEGMENTS[0])))
        assert pair.there.claim(digest)
        for layer in range(LAYOUT.layers):
            await asyncio.to_thread(pair.there.write_layer, digest, layer, *layer_of(LAYOUT, digest, length, layer))
            while not has(pair.here, digest) or len(pair.here.ready_pages(digest)) < 2 * (layer + 1):
                arrived.clear()
                await arrived.wait()
            assert not fetch.done() and pair.there.is_complete(digest) == (layer == LAYOUT.layers - 1)
        await fetch
        check(pair.here, SEGMENTS[0])
        assert seen == [(digest, n, begin, end) for n in range(3) for begin, end in LAYOUT.page_ranges(length)]
        unsubscribe()
        await pair.settled()

    run(test)


def test_what_waits_comes_layer_by_layer_whichever_segment_it_is_of() -> None:
    """A first step computes with a layer once it has all of it; the last segment is computed last, and is short."""

    async def test(pair: Pair) -> None:
        order: list[int] = []
        pair.here.subscribe(lambda digest, layer, begin, end: order.append(layer))
        ref = pair.ref()
        fill(pair.there)
        await pair.fetch(ref)
        assert len(order) == PAGES and order == sorted(order)

    run(test)


def test_nothing_is_pulled_twice() -> None:
    async def test(pair: Pair) -> None:
        one, other = pair.ref(), pair.ref(SEGMENTS[0])
        both = asyncio.gather(pair.fetch(one, other), pair.fetch(pair.ref()))
        await asyncio.sleep(0.05)
        fill(pair.there)
        await both
        await pair.fetch(pair.ref())
        third = (b"c" * 16, 3)
        ref = pair.ref(*SEGMENTS, third)
        fill(pair.there, third)
        await pair.fetch(ref)
        check(pair.here, *SEGMENTS, third)
        assert pair.there.stats().sent_bytes == pair.there.stats().computed_bytes == pair.here.stats().stored_bytes
        assert pair.here.stats().reused_segments == 6
        await pair.settled()

    run(test)


def test_another_request_goes_on_when_the_puller_is_cancelled() -> None:
    async def test(pair: Pair) -> None:
        first, other = pair.ref(), pair.ref()
        digest, length = SEGMENTS[0]
        assert pair.there.claim(digest)
        pair.there.write_layer(digest, 0, *layer_of(LAYOUT, digest, length, 0))
        began = asyncio.create_task(pair.fetch(first))
        while pair.here.stats().received_pages < 2:
            await asyncio.sleep(0.01)
        waits = asyncio.create_task(pair.fetch(other))
        await asyncio.sleep(0.05)
        began.cancel()
        with suppress(asyncio.CancelledError):
            await began
        for layer in (1, 2):
            pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
        fill(pair.there, SEGMENTS[1])
        await waits
        check(pair.here)
        assert pair.there.stats().sent_bytes == pair.here.stats().stored_bytes
        await pair.settled()

    run(test)


def test_a_source_that_dies_fails_the_request() -> None:
    async def test(pair: Pair) -> None:
        fetch = asyncio.create_task(pair.fetch(pair.ref()))
        digest, length = SEGMENTS[0]
        assert pair.there.claim(digest)
        pair.there.write_layer(digest, 0, *layer_of(LAYOUT, digest, length, 0))
        while pair.here.stats().received_pages < 2:
            await asyncio.sleep(0.01)
        await pair.server.stop(None)
        with pytest.raises(SourceUnavailable, match="thinker"):
            await fetch
        stats = pair.here.stats()
        assert (stats.leases, stats.pulls, stats.stored_bytes) == (0, 0, 0)

    run(test)


def test_who_asks_late_hears_why_a_segment_of_another_request_failed() -> None:
    async def test(pair: Pair) -> None:
        overflow, served = asyncio.Event(), pair.source._pages

        async def pages(request: kv_pb2.PullRequest) -> AsyncGenerator[bytes, None]:
            if SEGMENTS[0][0] in request.digests:
                await overflow.wait()
                raise NotFinite("overflow")
            async for page in served(request):
                yield page

        pair.source._pages = pages  # type: ignore[method-assign]
        first = asyncio.create_task(pair.fetch(pair.ref(SEGMENTS[0])))
        await until(lambda: pair.here.stats().pulls == 1)
        late = asyncio.create_task(pair.fetch(pair.ref()))  # it pulls the second segment, and waits for the first then
        await until(lambda: pair.here.stats().pulls == 2)
        overflow.set()
        with pytest.raises(NotFinite):
            await first
        fill(pair.there, SEGMENTS[1])
        with pytest.raises(NotFinite, match="overflow"):
            await late
        await pair.settled()

    run(test)


@pytest.mark.parametrize("how", ["dead", "silent", "damaged"])
def test_who_has_another_source_goes_on_when_one_fails(how: str) -> None:
    """Both have the first segment, as all plans have the system prompt."""

    async def test(pair: Pair) -> None:
        digest, length = SEGMENTS[0]
        async with _pair(LAYOUT) as other:
            pair.puller.sources["healthy"] = other.puller.sources["thinker"]
            refs = (pair.ref(), pair.ref(SEGMENTS[0]))
            if how != "damaged":
                assert pair.there.claim(digest)
                pair.there.write_layer(digest, 0, *layer_of(LAYOUT, digest, length, 0))
            fetches = [asyncio.create_task(pair.fetch(ref)) for ref in refs]
            await until(lambda: pair.here.stats().pulls == 1 and pair.here.stats().received_pages in (0, 2))
            healthy = asyncio.create_task(pair.fetch(other.ref(SEGMENTS[0], source="healthy")))
            await asyncio.sleep(0.1)
            fill(other.there, SEGMENTS[0])
            assert not healthy.done()
            if how == "dead":
                await pair.server.stop(None)
            elif how == "damaged":
                pair.source.damage = flipped(0)
                fill(pair.there, *SEGMENTS)
            else:
                pair.source.silent_after = pair.source.sent
                for layer in (1, 2):
                    pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
            kinds = {"dead": SourceUnavailable, "silent": KvTimeout, "damaged": IncompleteContext}
            for failed in await asyncio.gather(*fetches, return_exceptions=True):
                assert isinstance(failed, kinds[how])
            await healthy
            check(pair.here, SEGMENTS[0])
            await pair.puller.close()

    run(test, page_timeout_s=1.0)


def test_a_source_that_was_started_again_and_loads_is_no_loading_of_ours() -> None:
    async def test(pair: Pair) -> None:
        async def pages(request: kv_pb2.PullRequest) -> AsyncGenerator[bytes, None]:
            for page in list[bytes]():
                yield page
            raise Loading("the service is loading its model")

        pair.source._pages = pages  # type: ignore[method-assign]
        with pytest.raises(SourceUnavailable, match=r"thinker was started again .* loading its model"):
            await pair.fetch(pair.ref())
        await pair.settled()

    run(test)


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


def test_a_context_waits_for_room_in_the_store() -> None:
    async def test(pair: Pair) -> None:
        puller = KvPuller(
            KvStore(LAYOUT, FINGERPRINT, LAYOUT.segment_bytes(ROWS + 5), flag="--kv-cache-bytes"),
            {"thinker": pair.channel},
            room_wait_s=0.2,
        )

        async def patiently(ref: kv_pb2.ContextRef) -> None:
            async with puller.hold([ref], room_wait_s=math.inf) as held:
                await held.fetch()

        ref, other = pair.ref(), pair.ref((b"c" * 16, ROWS))
        fill(pair.there, *SEGMENTS, (b"c" * 16, ROWS))
        async with puller.hold([ref]) as held:
            with pytest.raises(StoreFull, match="--kv-cache-bytes"):
                async with puller.hold([other]):
                    pass
            waits = asyncio.create_task(patiently(pair.ref((b"c" * 16, ROWS))))  # of a request that has begun
            await held.fetch()
            await asyncio.sleep(0.5)
            assert not waits.done()
        await waits
        check(puller.store, (b"c" * 16, ROWS))
        await puller.close()
        await pair.settled()

    run(test)


def test_a_silent_source_fails_the_request_in_its_time() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        pair.source.silent_after = 2
        await fails(pair, KvTimeout, "thinker", "0.3 s", refs=[ref])
        pair.source.silent_after = None
        await pair.fetch(pair.ref())
        check(pair.here)

    run(test, page_timeout_s=0.3)


def test_a_long_queue_is_no_silence() -> None:
    async def test(pair: Pair) -> None:
        (digest, length), pages = SEGMENTS[1], LAYOUT.layers
        fetch = asyncio.create_task(pair.fetch(pair.ref(SEGMENTS[1])))
        await asyncio.sleep(1.0)  # queued
        assert pair.there.claim(digest)
        for layer in range(pages):  # computed slowly
            pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
            await asyncio.sleep(0.5)
        await fetch
        check(pair.here, SEGMENTS[1])
        there, here = pair.there.stats(), pair.here.stats()
        assert (there.sent_pages, here.received_pages, here.retried_pages) == (pages, pages, 0)
        await pair.settled()

    run(test, page_timeout_s=0.3)


def test_a_source_that_falls_silent_in_its_queue_fails_the_request_in_its_time() -> None:
    async def test(pair: Pair) -> None:
        pair.source.silent_after = 3  # signs of life
        await fails(pair, KvTimeout, "thinker", "0.3 s")
        assert pair.source.sent == 3

    run(test, page_timeout_s=0.3)


async def reading(call: Any) -> AsyncIterator[kv_pb2.PullResponse]:
    """The rest of a stream."""
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


def test_only_who_asks_for_signs_of_life_gets_them() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref(SEGMENTS[1])
        request = kv_pb2.PullRequest(digests=[SEGMENTS[1][0]], lease_id=ref.lease_id, **OURS)
        stub, quiet = KvBlocksServiceStub(pair.channel), kv_pb2.PullRequest()
        quiet.CopyFrom(request)
        request.waiting_seconds = 1e-9  # no more often than the source likes
        told, silent = stub.Pull(request), stub.Pull(quiet)
        for _ in range(3):
            life = await told.read()
            assert isinstance(life, kv_pb2.PullResponse)
            assert life == kv_pb2.PullResponse(waiting=kv_pb2.Waiting(pages=LAYOUT.layers))
            assert decode_page(life.SerializeToString()) is None
        fill(pair.there, SEGMENTS[1])
        assert [page.layer async for page in silent] == list(range(LAYOUT.layers))
        rest = [page async for page in reading(told)]
        assert [page.layer for page in rest if not page.HasField("waiting")] == list(range(LAYOUT.layers))
        assert pair.source.sent < 100
        pair.there.release([ref.lease_id])
        await pair.settled()

    run(test)


def test_what_does_not_fit_is_refused_with_its_name() -> None:
    async def test(pair: Pair) -> None:
        fill_later = pair.ref()
        fill(pair.there)
        pair.there.release([fill_later.lease_id])
        refs = {
            "unknown": pair.ref(source="elsewhere"),
            "foreign": pair.ref(fingerprint=b"other"),
            "lapsed": pair.ref(lease_id="gone"),
        }
        with pytest.raises(ConfigError, match="elsewhere"):
            await pair.fetch(refs["unknown"])
        with pytest.raises(ForeignContext, match=b"other".hex()):
            await pair.fetch(refs["foreign"])
        with pytest.raises(LeaseLapsed, match="gone"):
            await pair.fetch(refs["lapsed"])
        stats = pair.here.stats()
        assert (stats.leases, stats.pulls, stats.stored_bytes) == (0, 0, 0)
        await pair.puller.close()
        assert pair.there.stats().leases == 2  # the foreign one's was given back

    run(test)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"fingerprint": b"other"}, grpc.StatusCode.FAILED_PRECONDITION, (b"other".hex(), FINGERPRINT.hex())),
        ({"lease_id": "gone"}, grpc.StatusCode.UNAVAILABLE, ("gone",)),
        ({"digests": [b"?" * 16]}, grpc.StatusCode.NOT_FOUND, ((b"?" * 16).hex(),)),
        ({"head_end": 9}, grpc.StatusCode.INVALID_ARGUMENT, ("9",)),
        ({"layer_end": 9}, grpc.StatusCode.INVALID_ARGUMENT, ("9",)),
    ],
)
def test_a_source_refuses(change: dict[str, Any], code: grpc.StatusCode, words: tuple[str, ...]) -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fields = {"digests": [SEGMENTS[0][0]], "lease_id": ref.lease_id, **OURS, **change}
        stub = KvBlocksServiceStub(pair.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Pull(kv_pb2.PullRequest(**fields)).read()
        assert caught.value.code() == code
        assert all(word in str(caught.value.details()) for word in words)

    run(test)


def test_a_lease_that_lapses_while_a_pull_waits_ends_it() -> None:
    async def test(pair: Pair) -> None:
        lease = pair.there.lease(SEGMENTS, 0.2)
        request = kv_pb2.PullRequest(digests=[SEGMENTS[0][0]], lease_id=lease, **OURS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await KvBlocksServiceStub(pair.channel).Pull(request).read()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await pair.settled()
        assert pair.there.stats().stored_bytes == 0

    run(test)


def test_the_source_lease_is_renewed_while_its_context_is_held() -> None:
    async def test(pair: Pair) -> None:
        async with pair.puller.hold([pair.ref(ttl_s=0.3)]) as held:
            await asyncio.sleep(0.8)
            fill(pair.there)
            await held.fetch()
        check(pair.here)
        await pair.settled()

    run(test, lease_ttl_s=0.3)


def test_a_rank_pulls_only_its_heads() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        await pair.fetch(ref)
        for digest, length in SEGMENTS:
            k, v = pair.here.load(digest)
            for layer in range(LAYOUT.layers):
                whole = layer_of(LAYOUT, digest, length, layer)
                assert torch.equal(k[layer], whole[0][:, 1:3]) and torch.equal(v[layer], whole[1][:, 1:3])
        assert pair.there.stats().sent_bytes == pair.there.stats().computed_bytes // 2
        await pair.settled()

    run(test, here=KvLayout(3, 2, 64, "bfloat16", page_heads=4), head_begin=1)


def test_a_stock_client_reads_pages_and_stats() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        stub = KvBlocksServiceStub(pair.channel)
        request = kv_pb2.PullRequest(
            digests=[SEGMENTS[1][0]], lease_id=ref.lease_id, layer_begin=1, layer_end=2, **OURS
        )
        pages = [page async for page in stub.Pull(request)]
        k, v = layer_of(LAYOUT, *SEGMENTS[1], 1)
        assert [page.layer for page in pages] == [1]
        assert pages[0].payload == torch.stack((k, v)).view(torch.uint8).numpy().tobytes()
        page = decode_page(pages[0].SerializeToString())
        assert page is not None and page.payload == pages[0].payload
        stats = await stub.GetStats(kv_pb2.GetStatsRequest())
        assert (stats.sent_pages, stats.computed_segments, stats.leases) == (1, 2, 1)
        await stub.Release(kv_pb2.ReleaseRequest(lease_ids=[ref.lease_id]))
        renewed = await stub.Renew(kv_pb2.RenewRequest(lease_ids=[ref.lease_id]))
        assert list(renewed.lapsed_lease_ids) == [ref.lease_id]
        await pair.settled()

    run(test)


def test_random_cancels_leave_the_others_whole_and_nothing_held() -> None:
    async def test(pair: Pair) -> None:
        rng = Random(0)
        segments = [(bytes((letter,)) * 16, rng.choice((3, ROWS))) for letter in b"abcdef"]
        tasks = []
        for _ in range(60):
            chosen = rng.sample(segments, rng.randint(1, 4))
            cancel_after = rng.choice((None, 0.0, 0.01, 0.03))
            ref = pair.ref(*chosen)
            tasks.append(asyncio.create_task(_fetch_checked(pair, ref, chosen, cancel_after)))
            if rng.random() < 0.5:
                await asyncio.sleep(0.005)
            for digest, length in chosen:  # the engine computes what nobody has
                if has(pair.there, digest) and pair.there.claim(digest):
                    for layer in range(LAYOUT.layers):
                        pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
        ended = await asyncio.gather(*tasks)
        assert {True, False} == set(ended)
        await pair.settled()

    run(test)


async def _fetch_checked(
    pair: Pair, ref: kv_pb2.ContextRef, segments: list[tuple[bytes, int]], cancel_after: float | None
) -> bool:
    """Whether a fetch came to its end, exactly, before it was cancelled."""
    try:
        async with asyncio.timeout(cancel_after), pair.puller.hold([ref]) as held:
            await held.fetch()
            check(pair.here, *segments)
            return True
    except TimeoutError:
        assert cancel_after is not None
        return False
