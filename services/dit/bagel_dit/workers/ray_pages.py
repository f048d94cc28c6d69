"""K/V on a node of a Ray cluster that is not the server's: an actor pulls them into shared memory for the ranks there.

The server tells it which contexts to keep, to fetch and to land, by calls; K/V themselves never pass the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from bagel.deployment import serving
from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import LandedPage
from bagel.errors import IncompleteContext
from bagel.kv.arena import Arena
from bagel.kv.held import HeldContexts
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.store import KvStore
from bagel.prompts import BranchName
from bagel.rpc.security import THINKER
from bagel.rpc.transport import channel
from bagel.telemetry.logs import current_request, set_up_logs
from bagel.v1 import kv_pb2
from bagel_dit.page_loader import PageLoader
from bagel_dit.workers import SharedMemory

Pages = tuple[LandedPage, ...]


@dataclass
class _Kept:
    """The contexts of one request. landing: pages on their way to the server; None ends it."""

    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    opening: asyncio.Task[HeldContexts] | None = None
    landing: asyncio.Queue[Pages | None] = field(default_factory=asyncio.Queue)

    def held(self) -> HeldContexts:
        """The contexts, once there is room for them."""
        assert self.opening is not None
        return self.opening.result()


class PageActor:
    """The K/V of one node. All calls come from one server, and run in one event loop."""

    def __init__(self, nbytes: int, log_level: str) -> None:
        set_up_logs("dit-pages", log_level)
        self._arena = Arena(nbytes)
        self._kept: dict[str, _Kept] = {}

    async def memory(self, heads: tuple[int, int]) -> SharedMemory:
        """The memory that this node's ranks attach. heads: K/V heads of the model that it will have, begin and end."""
        self._heads = heads
        return SharedMemory(self._arena.name, self._arena.nbytes, self._heads)

    async def serve(self, config: DitConfig, whole: KvLayout, fingerprint: bytes, *, pinned: bool) -> None:
        """Get ready to pull. whole: the layout of all heads; fingerprint: of the K/V; pinned: the memory, by ranks."""
        if pinned:
            await asyncio.to_thread(self._arena.map_now)
        begin, end = self._heads
        layout = KvLayout(whole.layers, end - begin, whole.head_dim, whole.dtype, page_heads=whole.kv_heads)
        store = KvStore(layout, fingerprint, config.kv_cache_bytes, arena=self._arena, flag="--kv-cache-bytes")
        secure, addresses = serving.security(config), config.source_addresses
        names = serving.server_names(config, addresses, tls=secure.encrypted)
        sources = {name: channel(address, secure, names.get(name, THINKER)) for name, address in addresses.items()}
        self._puller = KvPuller(
            store,
            sources,
            page_timeout_s=config.kv_page_timeout_s,
            room_wait_s=config.batch_timeout_s,
            head_begin=begin,
            keeps_sources=False,  # the server does, for all nodes
        )

    async def hold(self, key: str, refs: Sequence[bytes], room_wait_s: float | None, request: str) -> tuple[int, int]:
        """Keep contexts until `release`; bytes of their distinct segments: of all, and of those that are not here yet.

        key: names the request in the calls that follow. Raises as `KvPuller.hold`.
        """
        current_request.set(request)
        contexts = [kv_pb2.ContextRef.FromString(ref) for ref in refs]
        kept = self._kept[key] = _Kept()
        # A task, which `release` can cancel while it waits for room.
        kept.opening = asyncio.create_task(
            kept.stack.enter_async_context(self._puller.hold(contexts, room_wait_s=room_wait_s))
        )
        await kept.opening
        store = self._puller.store
        lengths = {segment.digest: segment.length for ref in contexts for segment in ref.segments}
        nbytes = {digest: store.layout.segment_bytes(length) for digest, length in lengths.items()}
        return sum(nbytes.values()), sum(each for digest, each in nbytes.items() if not store.is_complete(digest))

    async def fetch(self, key: str, request: str) -> None:
        """Fetch what is kept, as `HeldContexts.fetch`."""
        current_request.set(request)
        await self._kept[key].held().fetch()

    async def land(self, key: str, refs: Mapping[BranchName, bytes]) -> AsyncIterator[Pages]:
        """Places of all pages of a picture's contexts in this node's memory, each as it becomes ready."""
        kept = self._kept[key]
        contexts = {branch: kv_pb2.ContextRef.FromString(ref) for branch, ref in refs.items()}
        with PageLoader(self._puller.store, contexts, kept.landing.put_nowait) as loader:
            loader.flush()
            while not (loader.complete and kept.landing.empty()):
                if (pages := await kept.landing.get()) is None:
                    raise IncompleteContext("the request ended while its K/V landed")
                yield pages

    async def check(self, key: str) -> None:
        """Raises LeaseLapsed unless the lease has run without a break since `hold`."""
        self._kept[key].held().check()

    async def release(self, key: str) -> None:
        """Keep a request's contexts no longer."""
        if (kept := self._kept.pop(key, None)) is None:
            return
        kept.landing.put_nowait(None)
        if kept.opening is not None:
            kept.opening.cancel()
            await asyncio.gather(kept.opening, return_exceptions=True)
        await kept.stack.aclose()

    async def stats(self) -> Mapping[str, int]:
        """Counters of the store here, by their names in GetStatsResponse."""
        return self._puller.store.stats().as_dict()
