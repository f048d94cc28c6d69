"""The K/V store: segments in shared memory, under leases, each computed or fetched once.

Thread-safe: an engine's thread writes while an event loop serves. All numbers of bytes are payload.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from bagel.errors import BagelError, ConfigError, IncompleteContext, StoreFull
from bagel.kv.arena import ALIGNMENT, Arena
from bagel.kv.counters import Counters, KvStats
from bagel.kv.ledger import Ledger
from bagel.kv.open_pages import OpenPages
from bagel.kv.pages import KvLayout, PageKey
from bagel.kv.segment import Claim, ReadyPage, Segment, Waiter, name

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
OnPage = Callable[[bytes, int, int, int], None]
"""Called with (digest, layer, token begin, token end)."""

PAGES_AT_ONCE = 4
"""Pages that a pull is given before it is seen which are ready by then."""
LOOK_AGAIN_S = 0.5
"""Seconds between two looks at the leases while a caller waits: nothing else runs when a lease lapses."""


class KvStore:
    """Segments of K/V of one layout and fingerprint in `capacity_bytes` of shared memory (`arena`).

    A segment is reserved by a lease, claimed by its writer, and ready page by page. A complete one stays as cache
    when its leases are gone, until room is needed; an incomplete one is freed, unless pinned or being filled: a holder
    that needs it no more, as it has its K/V already, takes it from nobody.
    """

    def __init__(
        self,
        layout: KvLayout,
        fingerprint: bytes,
        capacity_bytes: int,
        *,
        arena: Arena | None = None,
        flag: str = "--kv-store-bytes",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """arena: shared memory of at least capacity_bytes that is there already; made where not given.

        flag: the setting that capacity_bytes comes from, for messages.
        """
        if capacity_bytes < ALIGNMENT:
            raise ConfigError(f"{flag} is {capacity_bytes}; it must be at least {ALIGNMENT}")
        self.layout, self.fingerprint = layout, fingerprint
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        self.arena = arena if arena is not None else Arena(self.capacity_bytes)
        self._ledger = Ledger(layout, self.capacity_bytes, clock, flag)
        self._lock = threading.Lock()
        self._subscribers: list[OnPage] = []
        self.counters = Counters()

    # Leases

    def lease(self, segments: Sequence[tuple[bytes, int]], ttl_s: float, lease_id: str = "") -> str:
        """Hold segments (digest, tokens) for `ttl_s` seconds, reserving those that are not there; the lease's id.

        lease_id: a name of the caller's. Raises StoreFull, or InvalidRequest for a name that is taken or for what is
        larger than the store, and then holds nothing.
        """
        with self._entered():
            return self._ledger.open(segments, ttl_s, lease_id)

    async def lease_in_time(
        self, segments: Sequence[tuple[bytes, int]], ttl_s: float, lease_id: str = "", *, wait_s: float
    ) -> str:
        """As `lease`, but waits up to `wait_s` seconds for room. Raises StoreFull after them.

        Room goes to the first that came and fits: a small lease may pass a large one, as it may be what a request
        lacks to end.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            waiter: Waiter = (loop, loop.create_future())
            with self._entered():
                try:
                    return self._ledger.open(segments, ttl_s, lease_id)
                except StoreFull as full:
                    if (left := deadline - loop.time()) <= 0:
                        raise StoreFull(f"{full}; none came free within {wait_s:g} s", max(wait_s, 1.0)) from None
                # Entered under the lock of the failed try, so that room that comes free after it wakes this waiter.
                self._ledger.room_waiters[waiter] = None
            await self._woken(waiter, [self._ledger.room_waiters], min(left, LOOK_AGAIN_S))

    def extend(self, lease_id: str, segments: Sequence[tuple[bytes, int]]) -> None:
        """Hold more segments under a lease, or again those that failed. Raises LeaseLapsed or StoreFull."""
        with self._entered():
            self._ledger.hold(self._ledger.lease(lease_id), segments)

    def renew(self, lease_ids: Iterable[str]) -> list[str]:
        """Start the time of leases anew; those that had run out."""
        with self._entered():
            return self._ledger.renew(lease_ids)

    def release(self, lease_ids: Iterable[str]) -> None:
        """Give leases back; unknown ones are released already."""
        with self._entered():
            self._ledger.release(lease_ids)

    def check_lease(self, lease_id: str) -> None:
        """Raises LeaseLapsed if a lease does not run."""
        with self._entered():
            self._ledger.lease(lease_id)

    # Filling

    def claim(self, digest: bytes) -> Claim | None:
        """The right and the duty to fill a segment; None if it is complete or somebody else fills it."""
        with self._entered():
            segment = self._ledger.get(digest)
            if segment.complete or segment.claimed:
                return None
            segment.claim = Claim(segment)
            return segment.claim

    def unclaim(self, claim: Claim) -> None:
        """Give a claim back: another writer may claim the segment. No effect if the segment is complete or gone."""
        with self._entered():
            self._ledger.unclaim(claim)

    def fail(self, digest: bytes, error: BagelError) -> None:
        """Free a segment that cannot be filled; callers that wait for it get the error. No effect on a complete one."""
        with self._entered():
            if (segment := self._ledger.segments.get(digest)) and not segment.complete:
                self._ledger.discard(segment, error)

    def write_layer(self, digest: bytes, layer: int, k: Tensor, v: Tensor) -> None:
        """Store one computed layer, k and v [length, kv_heads, head_dim] of the layout's type on any device.

        Raises UnknownSegment if nothing holds the segment any more.
        """
        with self._writing(digest) as segment:
            rows = self._tensor(segment)[layer]
            for tensor in (k, v):
                if tensor.shape != rows.shape[1:] or tensor.dtype != rows.dtype:
                    raise ValueError(f"K/V is {tensor.dtype} {list(tensor.shape)}; the store's is {self.layout}")
            # Ready pages are not written again: readers have views of them.
            if missing := self._missing(segment, layer):
                rows[0].copy_(k)
                rows[1].copy_(v)
            self._mark(segment, [(layer, begin) for begin in missing], computed=True)

    def layer_rows(self, digest: bytes, layer: int) -> tuple[Tensor, Tensor] | None:
        """Memory for K and V of a layer, each [length, kv_heads, head_dim], to be filled before `mark_layer`.

        None if the layer is ready. For the writer that has claimed and pinned the segment. Raises UnknownSegment.
        """
        with self._entered():
            segment = self._ledger.get(digest)
            # Ready pages are not written again: readers have views of them.
            if not self._missing(segment, layer):
                return None
            rows = self._tensor(segment)[layer]
            return rows[0], rows[1]

    def mark_layer(self, digest: bytes, layer: int) -> None:
        """A layer has been written to the arena (`offsets`) from outside, while the segment was claimed and pinned.

        Raises UnknownSegment if nothing holds the segment any more.
        """
        with self._writing(digest) as segment:
            missing = self._missing(segment, layer)
            self._mark(segment, [(layer, begin) for begin in missing], computed=True)

    def write_page(self, digest: bytes, layer: int, token_begin: int, payload: memoryview) -> None:
        """Store one received page: K rows, then V rows.

        Raises UnknownSegment if nothing holds the segment any more, IncompleteContext for a page of another size.
        """
        with self._writing(digest) as segment:
            page = self._page(segment, layer, token_begin)
            half = len(page.k)
            if len(payload) != 2 * half:
                raise IncompleteContext(f"a page of {name(digest)} has {len(payload)} bytes; it must be {2 * half}")
            if (layer, token_begin) not in segment.ready:
                page.k[:], page.v[:] = payload[:half], payload[half:]
                self._mark(segment, [(layer, token_begin)], computed=False)

    def subscribe(self, callback: OnPage) -> Callable[[], None]:
        """Call `callback` in the writing thread for every page that becomes ready; a function that ends this."""
        with self._lock:
            # A new list each time, since writers go through the old one without the lock.
            self._subscribers = [*self._subscribers, callback]

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = [each for each in self._subscribers if each is not callback]

        return unsubscribe

    # Reading

    def is_complete(self, digest: bytes) -> bool:
        with self._entered():
            return (segment := self._ledger.segments.get(digest)) is not None and segment.complete

    def ready_pages(self, digest: bytes) -> list[tuple[int, int]]:
        """The pages that are there as (layer, token begin), in the order they became ready."""
        with self._entered():
            return list(self._ledger.get(digest).log)

    def load(self, digest: bytes) -> tuple[Tensor, Tensor]:
        """K and V of a complete segment, [layers, length, kv_heads, head_dim]: views, valid under a lease or pin."""
        with self._entered():
            segment = self._ledger.get(digest)
            if not segment.complete:
                raise IncompleteContext(
                    f"{name(digest)} has {len(segment.log)} of its {segment.page_count} pages; wait for it"
                )
            self._ledger.segments.move_to_end(digest)
            rows = self._tensor(segment)
            return rows[:, 0], rows[:, 1]

    def offsets(self, digest: bytes, layer: int) -> tuple[int, int]:
        """Where K and V of a layer begin in the arena, in bytes, for a process that has it attached."""
        with self._entered():
            segment = self._ledger.get(digest)
            return self._offsets(segment, layer)

    async def wait_segment(self, digest: bytes) -> bool:
        """True once a segment is complete, False if it has no writer: claim it. Raises its error."""
        with self._entered():
            segment = self._ledger.get(digest)

        def probe() -> bool | None:
            if segment.alive().complete:
                return True
            return None if segment.claimed else False

        return await self._until([segment], probe)

    def page_keys(self, digest: bytes, layers: range) -> list[PageKey]:
        """Names of all pages of some layers of a segment, ready or not."""
        with self._entered():
            ranges = self.layout.page_ranges(self._ledger.get(digest).length)
            return [PageKey(digest, layer, begin) for layer in layers for begin, _ in ranges]

    async def pages(
        self, wanted: Iterable[PageKey], lease_id: str, sign_s: float = math.inf
    ) -> AsyncGenerator[ReadyPage | int, None]:
        """The pages wanted, each once, as they become ready (OpenPages). Pins their segments meanwhile.

        After every sign_s seconds without a page, how many are still to come. Raises a segment's error, or LeaseLapsed
        if the lease runs out while there is something to wait for.
        Close it (`contextlib.aclosing`) if it is left early.
        """
        open_ = OpenPages()
        with self._entered():
            for key in wanted:
                segment = self._ledger.get(key.digest)
                self._page(segment, key.layer, key.token_begin)
                open_.want(segment, key.layer, key.token_begin)
            for segment in open_.segments:
                segment.pins += 1
        try:
            while True:
                try:
                    batch = await self._until(open_.segments, lambda: self._news(open_, lease_id), sign_s)
                except TimeoutError:
                    yield open_.left
                    continue
                if not batch:
                    return
                for page in batch:
                    yield page
        finally:
            with self._lock:
                for segment in open_.segments:
                    self._ledger.unpin(segment)

    def pin(self, digest: bytes) -> Segment:
        """Keep a segment's memory until `unpin`, whatever becomes of its leases; what to call `unpin` with."""
        with self._entered():
            segment = self._ledger.get(digest)
            segment.pins += 1
            return segment

    def unpin(self, segment: Segment) -> None:
        """Give back one pin of the very segment that was pinned: there may be another of its digest by now."""
        with self._entered():
            self._ledger.unpin(segment)

    # Counters

    def stats(self) -> KvStats:
        """Counters since the start, and what is held now."""
        with self._entered():
            segments = self._ledger.segments.values()
            return self.counters.stats(
                capacity_bytes=self.capacity_bytes,
                held_bytes=sum(segment.nbytes for segment in segments if segment.leases),
                stored_bytes=sum(segment.nbytes for segment in segments),
                leases=len(self._ledger.leases),
                reused_segments=self._ledger.reused_segments,
                reused_bytes=self._ledger.reused_bytes,
            )

    # Below here the lock is held, unless said otherwise

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Takes the lock and drops leases that have run out."""
        with self._lock:
            self._ledger.expire()
            yield

    def _missing(self, segment: Segment, layer: int) -> list[int]:
        """The begins of the pages that a layer still lacks."""
        ranges = self.layout.page_ranges(segment.length)
        return [begin for begin, _ in ranges if (layer, begin) not in segment.ready]

    def _news(self, open_: OpenPages, lease_id: str) -> list[ReadyPage] | None:
        """Take some open pages that are ready; [] if no page is open any more, None if the caller must wait."""
        open_.look()
        news = [self._page(*page) for page in open_.take(PAGES_AT_ONCE)]
        if not news and open_.left:
            self._ledger.lease(lease_id)
            return None
        return news

    # Without the lock

    @contextmanager
    def _writing(self, digest: bytes) -> Iterator[Segment]:
        """A segment, pinned: the bytes are copied without the lock."""
        with self._entered():
            segment = self._ledger.get(digest)
            segment.pins += 1
        try:
            yield segment
        finally:
            with self._lock:
                self._ledger.unpin(segment)

    def _mark(self, segment: Segment, pages: Sequence[tuple[int, int]], *, computed: bool) -> None:
        """Pages (layer, token begin) are ready: counts, wakes and calls."""
        with self._lock:
            new = [page for page in pages if segment.stored and page not in segment.ready]
            segment.ready.update(new)
            segment.log += new
            self._count_ready(segment, new, computed)
            if segment.complete:
                segment.claim = None
            subscribers = self._subscribers
            segment.wake()
        for layer, begin in new:
            end = min(begin + self.layout.page_tokens, segment.length)
            for callback in subscribers:
                callback(segment.digest, layer, begin, end)

    def _count_ready(self, segment: Segment, new: Sequence[tuple[int, int]], computed: bool) -> None:
        step = self.layout.page_tokens
        nbytes = sum(self.layout.layer_bytes(min(step, segment.length - begin)) for _, begin in new)
        if computed:
            segments = int(bool(new) and segment.complete)
            self.counters.count(computed_pages=len(new), computed_bytes=nbytes, computed_segments=segments)
        else:
            self.counters.count(received_pages=len(new), received_bytes=nbytes)

    async def _until(self, segments: Sequence[Segment], probe: Callable[[], T | None], limit_s: float = math.inf) -> T:
        """The first result of probe (called under the lock) that is not None, asked again when a segment changes.

        Raises TimeoutError if there is none within limit_s seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        while True:
            with self._entered():
                if (result := probe()) is not None:
                    return result
                if (left := deadline - loop.time()) <= 0:
                    raise TimeoutError
                waiter: Waiter = (loop, loop.create_future())
                # Entered under the lock of the probe, so that no change between the two is missed.
                for segment in segments:
                    segment.waiters[waiter] = None
            await self._woken(waiter, [segment.waiters for segment in segments], min(left, LOOK_AGAIN_S))

    async def _woken(self, waiter: Waiter, places: Sequence[dict[Waiter, None]], limit_s: float) -> None:
        """Returns once one of the places wakes the waiter, or after limit_s; it is in none of them then."""
        try:
            await asyncio.wait([waiter[1]], timeout=limit_s)
        finally:
            with self._lock:
                for waiters in places:
                    waiters.pop(waiter, None)

    def _offsets(self, segment: Segment, layer: int) -> tuple[int, int]:
        k = segment.offset + layer * self.layout.layer_bytes(segment.length)
        return k, k + segment.length * self.layout.row_bytes

    def _page(self, segment: Segment, layer: int, begin: int) -> ReadyPage:
        """A page's place, ready or not. Raises IncompleteContext if the segment has no such page."""
        end = self.layout.page_end(segment.length, begin)
        if end is None or not 0 <= layer < self.layout.layers:
            raise IncompleteContext(
                f"{name(segment.digest)} has no page at layer {layer}, token {begin}: it has {self.layout.layers} "
                f"layers of {segment.length} tokens in pages of {self.layout.page_tokens}"
            )
        row = self.layout.row_bytes
        k, v = (self.arena.slice(at + begin * row, (end - begin) * row) for at in self._offsets(segment, layer))
        return ReadyPage(PageKey(segment.digest, layer, begin), end, k, v)

    def _tensor(self, segment: Segment) -> Tensor:
        """A segment's memory as [layers, 2, length, kv_heads, head_dim], without a copy."""
        import torch  # by the engines alone, which have loaded it already

        flat = torch.frombuffer(
            self.arena.slice(segment.offset, segment.nbytes), dtype=getattr(torch, self.layout.dtype)
        )
        return flat.view(self.layout.layers, 2, segment.length, self.layout.kv_heads, self.layout.head_dim)
