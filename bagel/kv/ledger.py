"""The books of a store: which segment has which memory, and which lease keeps it. Not thread-safe, no I/O."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from bagel.errors import BagelError, InvalidRequest, LeaseLapsed, StoreFull, UnknownSegment
from bagel.kv.arena import ALIGNMENT
from bagel.kv.digests import DIGEST_BYTES
from bagel.kv.first_fit import FirstFit
from bagel.kv.pages import KvLayout
from bagel.kv.segment import Claim, Lease, Segment, Waiter, name, wake

LONGEST_ID = 64


class Ledger:
    """Segments and leases in `capacity_bytes`, and what of it was wanted again (reused).

    flag: the setting of the capacity, for messages; room_waiters: callers that wait for memory, in the order they came.
    """

    def __init__(self, layout: KvLayout, capacity_bytes: int, clock: Callable[[], float], flag: str) -> None:
        self.layout, self.capacity_bytes, self._clock, self._flag = layout, capacity_bytes, clock, flag
        self.room_waiters: dict[Waiter, None] = {}
        self.segments: OrderedDict[bytes, Segment] = OrderedDict()  # least recently used first
        self.leases: dict[str, Lease] = {}
        self.reused_segments = self.reused_bytes = 0
        self._orphans: list[Segment] = []  # gone, but pinned
        self._allocator = FirstFit(capacity_bytes, ALIGNMENT)

    def open(self, segments: Sequence[tuple[bytes, int]], ttl_s: float, lease_id: str = "") -> str:
        """A new lease of segments; its id. Raises StoreFull, or InvalidRequest for what can never fit."""
        if lease_id in self.leases or len(lease_id) > LONGEST_ID:
            raise InvalidRequest("lease_id", f"lease_id is {lease_id[:80]!r}; it must be new, of at most {LONGEST_ID}")
        lease = Lease(lease_id or secrets.token_hex(8), ttl_s, self._clock() + ttl_s)
        # Held before it is entered: this may raise, and a lease that holds nothing is not kept.
        self.hold(lease, segments)
        self.leases[lease.lease_id] = lease
        return lease.lease_id

    def renew(self, lease_ids: Iterable[str]) -> list[str]:
        """Start the time of leases anew; those that had run out."""
        lapsed = []
        for lease_id in lease_ids:
            if lease := self.leases.get(lease_id):
                lease.deadline = self._clock() + lease.ttl_s
            else:
                lapsed.append(lease_id)
        return lapsed

    def release(self, lease_ids: Iterable[str]) -> None:
        """Give leases back; unknown ones are released already."""
        for lease_id in lease_ids:
            if lease := self.leases.pop(lease_id, None):
                self._let_go(lease)

    def expire(self) -> None:
        """Release the leases that have run out."""
        now = self._clock()
        self.release([lease.lease_id for lease in self.leases.values() if lease.deadline <= now])

    def get(self, digest: bytes) -> Segment:
        """The segment; raises what it failed with if a lease still wants it, else UnknownSegment."""
        if (segment := self.segments.get(digest)) is not None:
            return segment
        for lease in self.leases.values():
            if failed := lease.segments.get(digest):
                failed.alive()
        raise UnknownSegment(f"{name(digest)} is not held here: it was never leased, was evicted, or failed")

    def unclaim(self, claim: Claim) -> None:
        """Nobody fills a segment any more; no effect if the claim is over."""
        if (segment := claim.segment).claim is claim:
            segment.claim = None
            segment.wake()
            self._settle(segment)
            wake(self.room_waiters)

    def lease(self, lease_id: str) -> Lease:
        if (lease := self.leases.get(lease_id)) is None:
            raise LeaseLapsed(
                f"lease {lease_id!r} is not known here: it ran out, or the service was started again since; send the "
                "request again"
            )
        return lease

    def hold(self, lease: Lease, segments: Sequence[tuple[bytes, int]]) -> None:
        """Add segments to a lease; all or none."""
        wanted = {d: n for d, n in segments if (mine := lease.segments.get(d)) is None or not mine.stored}
        for digest, length in wanted.items():
            self._check(digest, length)
        # More than the whole store is refused now, since no wait would make room for it.
        self._check_total({d: segment.length for d, segment in lease.segments.items() if segment.stored} | wanted)
        known = {digest: self.segments[digest] for digest in wanted if digest in self.segments}
        for segment in known.values():  # first, so that they are not evicted for the others
            segment.leases += 1
        try:
            new = self._reserve([(d, n) for d, n in wanted.items() if d not in known])
        except StoreFull:
            for segment in known.values():
                segment.leases -= 1
            raise
        for segment in known.values():
            self.reused_segments += 1
            self.reused_bytes += segment.nbytes
            self.segments.move_to_end(segment.digest)
        lease.segments |= known | {segment.digest: segment for segment in new}

    def _check(self, digest: bytes, length: int) -> None:
        if len(digest) != DIGEST_BYTES or length < 1:
            raise InvalidRequest("segments", f"{name(digest)} of {length} rows; digests have 16 bytes, rows are > 0")
        if (known := self.segments.get(digest)) and known.length != length:
            raise InvalidRequest("segments", f"{name(digest)} has {known.length} rows here; {length} were asked for")

    def _check_total(self, lengths: Mapping[bytes, int]) -> None:
        total = sum(self._allocator.aligned(self.layout.segment_bytes(length)) for length in lengths.values())
        if total > self.capacity_bytes:
            raise InvalidRequest(
                "prompt",
                f"the request needs {total} bytes of K/V at once; the store has {self.capacity_bytes} in all: shorten "
                f"the prompt, send smaller images, or start the service with a larger {self._flag}",
            )

    def _reserve(self, wanted: Sequence[tuple[bytes, int]]) -> list[Segment]:
        """New segments with one lease each; evicts what is needed for them, and nothing if they do not fit."""
        sizes = [self.layout.segment_bytes(length) for _, length in wanted]
        for victim in self._victims(sizes):
            self.discard(victim, None)
        reserved = []
        for (digest, length), nbytes in zip(wanted, sizes, strict=True):
            offset = self._allocator.allocate(nbytes)
            assert offset is not None  # it was tried
            pages = self.layout.layers * len(self.layout.page_ranges(length))
            self.segments[digest] = Segment(digest, length, offset, nbytes, pages, leases=1)
            reserved.append(self.segments[digest])
        if reserved:
            # Others may wait for room for the same segments: they share these, and need the less.
            wake(self.room_waiters)
        return reserved

    def _victims(self, sizes: Sequence[int]) -> list[Segment]:
        """What must be evicted for blocks of these sizes, least recently used first. Raises StoreFull.

        Tried on a copy: a failed request must cost no cache, and wake nobody who would fail and wake it in turn.
        """
        trial, blocks = self._allocator.copy(), sum(map(self._allocator.aligned, sizes))
        idle = [segment for segment in self.segments.values() if segment.idle]
        for number, segment in enumerate(idle):
            if trial.unused >= blocks and trial.fits(*sizes):
                return idle[:number]
            trial.free(segment.offset, segment.nbytes)
        if trial.fits(*sizes):
            return idle
        raise self._full(sum(sizes))

    def _full(self, nbytes: int) -> StoreFull:
        held = sum(segment.nbytes for segment in self.segments.values() if not segment.idle)
        return StoreFull(
            f"{nbytes} bytes of K/V do not fit: running requests hold {held} of the store's {self.capacity_bytes} "
            f"bytes; try again later, give it more with {self._flag}, or send fewer requests at once"
        )

    def _let_go(self, lease: Lease) -> None:
        for segment in lease.segments.values():
            segment.leases -= 1
            self._settle(segment)
            segment.wake()
        wake(self.room_waiters)

    def unpin(self, segment: Segment) -> None:
        segment.pins -= 1
        if segment.stored:
            self._settle(segment)
        # It was discarded while pinned; only now may its memory be used again.
        elif not segment.pins:
            self._orphans.remove(segment)
            self._allocator.free(segment.offset, segment.nbytes)
        if not segment.pins:
            wake(self.room_waiters)

    def _settle(self, segment: Segment) -> None:
        """What becomes of a segment that lost a lease, a pin or its claim."""
        if not segment.stored or not segment.idle:
            return
        if segment.complete:
            self.segments.move_to_end(segment.digest)
        else:
            self.discard(segment, LeaseLapsed(f"all leases of {name(segment.digest)} ended before it was complete"))

    def discard(self, segment: Segment, error: BagelError | None) -> None:
        """Take a segment out of the store; its memory is free once it has no pins."""
        del self.segments[segment.digest]
        segment.stored, segment.claim, segment.error = False, None, error
        if segment.pins:
            self._orphans.append(segment)
        else:
            self._allocator.free(segment.offset, segment.nbytes)
        segment.wake()
        wake(self.room_waiters)
