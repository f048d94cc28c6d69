"""A source of K/V and a store that pulls from it over real gRPC, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from bagel.errors import (
    BagelError,
    UnknownSegment,
)
from bagel.kv.codec import PAGE_VERSION
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.service import KvBlocksServicer, add_kv_blocks
from bagel.kv.store import KvStore
from bagel.v1 import kv_pb2

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
        async with asyncio.timeout(20), paired(layout, **options) as pair:
            await test(pair)

    asyncio.run(main())


@asynccontextmanager
async def paired(layout: KvLayout, here: KvLayout | None = None, **options: Any) -> AsyncIterator[Pair]:
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
