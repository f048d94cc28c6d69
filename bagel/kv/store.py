"""The K/V store: segments in shared memory, under leases, each computed or fetched once.

Thread-safe: an engine's thread writes while an event loop serves. All numbers of bytes are payload.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from bagel.errors import (
    BagelError,
    ConfigError,
    IncompleteContext,
    InvalidRequest,
    LeaseLapsed,
    StoreFull,
    UnknownSegment,
)
from bagel.kv.arena import ALIGNMENT, Allocator, Arena
from bagel.kv.digests import DIGEST_BYTES
from bagel.kv.pages import KvLayout, PageKey
from bagel.kv.segment import KvStats, Lease, ReadyPage, Segment, Waiter

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
OnPage = Callable[[bytes, int, int, int], None]
"""Called with (digest, layer, token begin, token end)."""

LOOK_AGAIN_S = 0.5
"""Who waits looks at the leases this often: nothing else runs when a lease lapses."""


@dataclass
class _Open:
    """Pages of a segment, as (layer, token begin), that somebody still wants; seen: how much of its log was read."""

    pages: set[tuple[int, int]] = field(default_factory=set)
    seen: int = 0


class KvStore:
    """Segments of K/V of one layout and fingerprint in `capacity_bytes` of shared memory (`arena`).

    A segment is reserved by a lease, claimed by whoever fills it, and ready page by page. A complete one stays as cache
    when its leases are gone, until room is needed; an incomplete one is freed, unless pinned.
    """

    def __init__(
        self,
        layout: KvLayout,
        fingerprint: bytes,
        capacity_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity_bytes < ALIGNMENT:
            raise ConfigError(f"--kv-store-bytes is {capacity_bytes}; it must be at least {ALIGNMENT}")
        self.layout, self.fingerprint = layout, fingerprint
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        self.arena = Arena(self.capacity_bytes)
        self._allocator = Allocator(self.capacity_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._segments: OrderedDict[bytes, Segment] = OrderedDict()  # least recently used first
        self._orphans: list[Segment] = []  # gone, but pinned
        self._leases: dict[str, Lease] = {}
        self._subscribers: list[OnPage] = []
        self._counts = KvStats(capacity_bytes=self.capacity_bytes)

    # Leases

    def lease(self, segments: Sequence[tuple[bytes, int]], ttl_s: float) -> str:
        """Hold segments (digest, tokens) for `ttl_s` seconds, reserving those that are not there; the lease's id.

        Raises StoreFull, and then holds nothing.
        """
        with self._entered():
            lease = Lease(secrets.token_hex(8), ttl_s, self._clock() + ttl_s)
            self._hold(lease, segments)
            self._leases[lease.lease_id] = lease
            return lease.lease_id

    def extend(self, lease_id: str, segments: Sequence[tuple[bytes, int]]) -> None:
        """Hold more segments under a lease, or again those that failed. Raises LeaseLapsed or StoreFull."""
        with self._entered():
            self._hold(self._lease(lease_id), segments)

    def renew(self, lease_ids: Iterable[str]) -> list[str]:
        """Start the time of leases anew; those that had run out."""
        with self._entered():
            lapsed = []
            for lease_id in lease_ids:
                if lease := self._leases.get(lease_id):
                    lease.deadline = self._clock() + lease.ttl_s
                else:
                    lapsed.append(lease_id)
            return lapsed

    def release(self, lease_ids: Iterable[str]) -> None:
        """Give leases back; unknown ones are released already."""
        with self._entered():
            for lease_id in lease_ids:
                if lease := self._leases.pop(lease_id, None):
                    self._let_go(lease)

    def expire(self) -> None:
        """Drop the leases that have run out. Every other method does so too."""
        with self._entered():
            pass

    def check_lease(self, lease_id: str) -> None:
        """Raises LeaseLapsed if a lease does not run."""
        with self._entered():
            self._lease(lease_id)

    # Filling

    def claim(self, digest: bytes) -> bool:
        """Whether the caller must fill a segment: False if it is complete or somebody else fills it."""
        with self._entered():
            segment = self._get(digest)
            if segment.complete or segment.claimed:
                return False
            segment.claimed = True
            return True

    def unclaim(self, digest: bytes) -> None:
        """Give a claim back: whoever waits for the segment may claim it. No effect on one that is complete or gone."""
        with self._entered():
            if (segment := self._segments.get(digest)) and segment.claimed:
                segment.claimed = False
                segment.wake()

    def fail(self, digest: bytes, error: BagelError) -> None:
        """Free a segment that cannot be filled; whoever waits for it gets the error. No effect on a complete one."""
        with self._entered():
            if (segment := self._segments.get(digest)) and not segment.complete:
                self._discard(segment, error)

    def write_layer(self, digest: bytes, layer: int, k: Tensor, v: Tensor) -> None:
        """Store one computed layer, k and v [length, kv_heads, head_dim] of the layout's type on any device.

        Raises UnknownSegment if nothing holds the segment any more.
        """
        with self._writing(digest) as segment:
            rows = self._tensor(segment)[layer]
            for tensor in (k, v):
                if tensor.shape != rows.shape[1:] or tensor.dtype != rows.dtype:
                    raise ValueError(f"K/V is {tensor.dtype} {list(tensor.shape)}; the store's is {self.layout}")
            if missing := self._missing(segment, layer):
                rows[0].copy_(k)
                rows[1].copy_(v)
            self._mark(segment, [(layer, begin) for begin in missing], computed=True)

    def write_page(self, digest: bytes, layer: int, token_begin: int, payload: memoryview) -> None:
        """Store one received page: K rows, then V rows.

        Raises UnknownSegment if nothing holds the segment any more, IncompleteContext for a page of another size.
        """
        with self._writing(digest) as segment:
            page = self._page(segment, layer, token_begin)
            half = len(page.k)
            if len(payload) != 2 * half:
                raise IncompleteContext(f"a page of {_name(digest)} has {len(payload)} bytes; it must be {2 * half}")
            if (layer, token_begin) not in segment.ready:
                page.k[:], page.v[:] = payload[:half], payload[half:]
                self._mark(segment, [(layer, token_begin)], computed=False)

    def subscribe(self, callback: OnPage) -> Callable[[], None]:
        """Call `callback` in the writing thread for every page that becomes ready; a function that ends this."""
        with self._lock:
            self._subscribers = [*self._subscribers, callback]

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = [each for each in self._subscribers if each is not callback]

        return unsubscribe

    # Reading

    def has(self, digest: bytes) -> bool:
        """Whether a segment is here, complete or not."""
        with self._entered():
            return digest in self._segments

    def is_complete(self, digest: bytes) -> bool:
        with self._entered():
            return (segment := self._segments.get(digest)) is not None and segment.complete

    def layer_ready(self, digest: bytes, layer: int) -> bool:
        """Whether all pages of a layer are there."""
        with self._entered():
            segment = self._segments.get(digest)
            return segment is not None and not self._missing(segment, layer)

    def ready_pages(self, digest: bytes) -> list[tuple[int, int]]:
        """The pages that are there as (layer, token begin), in the order they became ready."""
        with self._entered():
            return list(self._get(digest).log)

    def load(self, digest: bytes) -> tuple[Tensor, Tensor]:
        """K and V of a complete segment, [layers, length, kv_heads, head_dim]: views, valid under a lease or pin."""
        with self._entered():
            segment = self._get(digest)
            if not segment.complete:
                raise IncompleteContext(
                    f"{_name(digest)} has {len(segment.log)} of its {segment.page_count} pages; wait for it"
                )
            self._segments.move_to_end(digest)
            rows = self._tensor(segment)
            return rows[:, 0], rows[:, 1]

    def offsets(self, digest: bytes, layer: int) -> tuple[int, int]:
        """Where K and V of a layer begin in the arena, in bytes, for a process that has it attached."""
        with self._entered():
            segment = self._get(digest)
            return self._offsets(segment, layer)

    async def wait_page(self, digest: bytes, layer: int, token_begin: int) -> ReadyPage:
        """The page, once it is there. Raises the segment's error."""
        with self._entered():
            segment = self._get(digest)
            page = self._page(segment, layer, token_begin)

        def probe() -> bool | None:
            return True if (layer, token_begin) in _alive(segment).ready else None

        await self._until([segment], probe)
        return page

    async def wait_segment(self, digest: bytes) -> bool:
        """True once a segment is complete, False if nobody fills it (any more): claim it. Raises its error."""
        with self._entered():
            segment = self._get(digest)

        def probe() -> bool | None:
            if _alive(segment).complete:
                return True
            return None if segment.claimed else False

        return await self._until([segment], probe)

    def page_keys(self, digest: bytes, layers: range) -> list[PageKey]:
        """Names of all pages of some layers of a segment, ready or not."""
        with self._entered():
            ranges = self.layout.page_ranges(self._get(digest).length)
            return [PageKey(digest, layer, begin) for layer in layers for begin, _ in ranges]

    async def pages(self, wanted: Iterable[PageKey], lease_id: str) -> AsyncGenerator[ReadyPage, None]:
        """The pages wanted, each once, in whatever order they become ready. Pins their segments meanwhile.

        Raises a segment's error, or LeaseLapsed if the lease runs out while there is something to wait for.
        Close it (`contextlib.aclosing`) if it is left early.
        """
        open_: dict[Segment, _Open] = {}
        with self._entered():
            for key in wanted:
                segment = self._get(key.digest)
                self._page(segment, key.layer, key.token_begin)
                open_.setdefault(segment, _Open()).pages.add((key.layer, key.token_begin))
            for segment in open_:
                segment.pins += 1
        try:
            while batch := await self._until(list(open_), lambda: self._news(open_, lease_id)):
                for page in batch:
                    yield page
        finally:
            with self._lock:
                for segment in open_:
                    self._unpin(segment)

    def pin(self, digest: bytes) -> None:
        """Keep a segment's memory until `unpin`, whatever becomes of its leases."""
        with self._entered():
            self._get(digest).pins += 1

    def unpin(self, digest: bytes) -> None:
        with self._entered():
            segments = [*self._orphans, *self._segments.values()]
            segment = next((each for each in segments if each.digest == digest and each.pins), None)
            if segment is not None:
                self._unpin(segment)

    # Counters

    def stats(self) -> KvStats:
        """Counters since the start, and what is held now."""
        with self._entered():
            segments = self._segments.values()
            return replace(
                self._counts,
                held_bytes=sum(segment.nbytes for segment in segments if segment.leases),
                stored_bytes=sum(segment.nbytes for segment in segments),
                leases=len(self._leases),
            )

    def count_sent(self, nbytes: int) -> None:
        """A page was sent."""
        with self._lock:
            self._counts.sent_pages += 1
            self._counts.sent_bytes += nbytes

    def count_retried(self, pages: int) -> None:
        """Pages were asked for once more."""
        with self._lock:
            self._counts.retried_pages += pages

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Counts a pull while it runs."""
        with self._lock:
            self._counts.pulls += 1
        try:
            yield
        finally:
            with self._lock:
                self._counts.pulls -= 1

    # Below here the lock is held, unless said otherwise

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Takes the lock and drops leases that have run out."""
        with self._lock:
            now = self._clock()
            for lease in [lease for lease in self._leases.values() if lease.deadline <= now]:
                del self._leases[lease.lease_id]
                self._let_go(lease)
            yield

    def _get(self, digest: bytes) -> Segment:
        if (segment := self._segments.get(digest)) is None:
            raise UnknownSegment(f"{_name(digest)} is not held here: it was never leased, was evicted, or failed")
        return segment

    def _lease(self, lease_id: str) -> Lease:
        if (lease := self._leases.get(lease_id)) is None:
            raise LeaseLapsed(f"lease {lease_id!r} has run out or was never given; send the request again")
        return lease

    def _hold(self, lease: Lease, segments: Sequence[tuple[bytes, int]]) -> None:
        """Add segments to a lease; all or none."""
        wanted = {d: n for d, n in segments if (mine := lease.segments.get(d)) is None or not mine.stored}
        for digest, length in wanted.items():
            self._check(digest, length)
        known = {digest: self._segments[digest] for digest in wanted if digest in self._segments}
        for segment in known.values():  # first, so that they are not evicted for the others
            segment.leases += 1
        try:
            new = self._reserve([(d, n) for d, n in wanted.items() if d not in known])
        except StoreFull:
            for segment in known.values():
                segment.leases -= 1
            raise
        for segment in known.values():
            self._counts.reused_segments += 1
            self._counts.reused_bytes += segment.nbytes
            self._segments.move_to_end(segment.digest)
        lease.segments |= known | {segment.digest: segment for segment in new}

    def _check(self, digest: bytes, length: int) -> None:
        if len(digest) != DIGEST_BYTES or length < 1:
            raise InvalidRequest("segments", f"{_name(digest)} of {length} rows; digests have 16 bytes, rows are > 0")
        if (known := self._segments.get(digest)) and known.length != length:
            raise InvalidRequest("segments", f"{_name(digest)} has {known.length} rows here; {length} were asked for")

    def _reserve(self, wanted: Sequence[tuple[bytes, int]]) -> list[Segment]:
        """New segments with one lease each; evicts what is needed for them."""
        sizes = [self.layout.segment_bytes(length) for _, length in wanted]
        idle = [segment for segment in self._segments.values() if segment.idle]
        if sum(sizes) > self._allocator.free_bytes + sum(segment.nbytes for segment in idle):
            raise self._full(sum(sizes))
        reserved: list[Segment] = []
        for (digest, length), nbytes in zip(wanted, sizes, strict=True):
            while (offset := self._allocator.allocate(nbytes)) is None and idle:
                self._discard(idle.pop(0), None)
            if offset is None:
                for segment in reserved:
                    self._discard(segment, None)
                raise self._full(sum(sizes))
            pages = self.layout.layers * len(self.layout.page_ranges(length))
            segment = Segment(digest, length, offset, nbytes, pages, leases=1)
            reserved.append(segment)
            self._segments[digest] = segment
        return reserved

    def _full(self, nbytes: int) -> StoreFull:
        held = sum(segment.nbytes for segment in self._segments.values() if not segment.idle)
        return StoreFull(
            f"{nbytes} bytes of K/V do not fit: running requests hold {held} of the store's {self.capacity_bytes} "
            "bytes; give it more with --kv-store-bytes, or send fewer requests at once"
        )

    def _let_go(self, lease: Lease) -> None:
        for segment in lease.segments.values():
            segment.leases -= 1
            self._settle(segment)
            segment.wake()

    def _unpin(self, segment: Segment) -> None:
        segment.pins -= 1
        if segment.stored:
            self._settle(segment)
        elif not segment.pins:
            self._orphans.remove(segment)
            self._allocator.free(segment.offset, segment.nbytes)

    def _settle(self, segment: Segment) -> None:
        """What becomes of a segment that lost a lease or a pin."""
        if not segment.stored or not segment.idle:
            return
        if segment.complete:
            self._segments.move_to_end(segment.digest)
        else:
            self._discard(segment, LeaseLapsed(f"all leases of {_name(segment.digest)} ended before it was complete"))

    def _discard(self, segment: Segment, error: BagelError | None) -> None:
        """Take a segment out of the store; its memory is free once it has no pins."""
        del self._segments[segment.digest]
        segment.stored, segment.claimed, segment.error = False, False, error
        if segment.pins:
            self._orphans.append(segment)
        else:
            self._allocator.free(segment.offset, segment.nbytes)
        segment.wake()

    def _missing(self, segment: Segment, layer: int) -> list[int]:
        """Where the pages of a layer begin that are not there."""
        ranges = self.layout.page_ranges(segment.length)
        return [begin for begin, _ in ranges if (layer, begin) not in segment.ready]

    def _news(self, open_: dict[Segment, _Open], lease_id: str) -> list[ReadyPage] | None:
        """Open pages that are ready, which are open no more; [] if none is open, None for: wait."""
        news = []
        for segment, each in open_.items():
            log = _alive(segment).log
            ready = [page for page in log[each.seen :] if page in each.pages]
            each.seen = len(log)
            each.pages.difference_update(ready)
            news += [self._page(segment, *page) for page in ready]
        if not news and any(each.pages for each in open_.values()):
            self._lease(lease_id)
            return None
        return news

    # Without the lock

    @contextmanager
    def _writing(self, digest: bytes) -> Iterator[Segment]:
        """A segment, pinned: the bytes are copied without the lock."""
        with self._entered():
            segment = self._get(digest)
            segment.pins += 1
        try:
            yield segment
        finally:
            with self._lock:
                self._unpin(segment)

    def _mark(self, segment: Segment, pages: Sequence[tuple[int, int]], *, computed: bool) -> None:
        """Pages (layer, token begin) are ready: counts, wakes and calls."""
        with self._lock:
            new = [page for page in pages if page not in segment.ready]
            segment.ready.update(new)
            segment.log += new
            self._count_ready(segment, new, computed)
            if segment.complete:
                segment.claimed = False
            subscribers = self._subscribers
            segment.wake()
        for layer, begin in new:
            end = min(begin + self.layout.page_tokens, segment.length)
            for callback in subscribers:
                callback(segment.digest, layer, begin, end)

    def _count_ready(self, segment: Segment, new: Sequence[tuple[int, int]], computed: bool) -> None:
        counts, step = self._counts, self.layout.page_tokens
        nbytes = sum(self.layout.layer_bytes(min(step, segment.length - begin)) for _, begin in new)
        if computed:
            counts.computed_pages += len(new)
            counts.computed_bytes += nbytes
            counts.computed_segments += bool(new) and segment.complete
        else:
            counts.received_pages += len(new)
            counts.received_bytes += nbytes

    async def _until(self, segments: Sequence[Segment], probe: Callable[[], T | None]) -> T:
        """The first result of probe (called under the lock) that is not None, asked again when a segment changes."""
        loop = asyncio.get_running_loop()
        while True:
            with self._entered():
                if (result := probe()) is not None:
                    return result
                waiter: Waiter = (loop, loop.create_future())
                for segment in segments:
                    segment.waiters.add(waiter)
            try:
                await asyncio.wait([waiter[1]], timeout=LOOK_AGAIN_S)
            finally:
                with self._lock:
                    for segment in segments:
                        segment.waiters.discard(waiter)

    def _offsets(self, segment: Segment, layer: int) -> tuple[int, int]:
        k = segment.offset + layer * self.layout.layer_bytes(segment.length)
        return k, k + segment.length * self.layout.row_bytes

    def _page(self, segment: Segment, layer: int, begin: int) -> ReadyPage:
        """A page's place, ready or not. Raises IncompleteContext if the segment has no such page."""
        end = self.layout.page_end(segment.length, begin)
        if end is None or not 0 <= layer < self.layout.layers:
            raise IncompleteContext(
                f"{_name(segment.digest)} has no page at layer {layer}, token {begin}: it has {self.layout.layers} "
                f"layers of {segment.length} tokens in pages of {self.layout.page_tokens}"
            )
        row = self.layout.row_bytes
        k, v = (self.arena.slice(at + begin * row, (end - begin) * row) for at in self._offsets(segment, layer))
        return ReadyPage(PageKey(segment.digest, layer, begin), end, k, v)

    def _tensor(self, segment: Segment) -> Tensor:
        """A segment as [layers, 2, length, kv_heads, head_dim], without a copy."""
        import torch

        memory = self.arena.slice(segment.offset, segment.nbytes)
        flat = torch.frombuffer(memory, dtype=getattr(torch, self.layout.dtype))
        return flat.view(self.layout.layers, 2, segment.length, self.layout.kv_heads, self.layout.head_dim)


def _alive(segment: Segment) -> Segment:
    """The segment; raises its error if it is gone."""
    if segment.error is not None:
        raise segment.error
    return segment


def _name(digest: bytes) -> str:
    return f"segment {digest.hex()}"
