"""The store's protocol against a small model: any order of calls, of wake-ups and of time (docs/kv-protocol.md)."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bagel.errors import BagelError, InvalidRequest, LeaseLapsed, NotFinite, StoreFull, UnknownSegment
from bagel.kv.pages import PageKey
from bagel.kv.segment import Claim, Segment
from bagel.kv.store import LOOK_AGAIN_S, KvStore
from tests.kv.protocol.books import DIGESTS, LAYOUT, LENGTHS, PAGES, audit, bytes_of, content, fits, segment_of
from tests.kv.protocol.interleaving import InterleavingLoop

CAPACITY = 384
"""Room for six blocks; the segments take one to three."""
pytestmark = pytest.mark.slow

PICKS = st.lists(st.integers(0, 5), max_size=12)
SOME = st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=3, unique=True)
ANY = st.integers(0, 99)


@dataclass
class ModelLease:
    ttl_s: float
    deadline: float
    segments: dict[bytes, Segment]


@dataclass
class Writer:
    """Who was granted a claim. over: it was given back, or ended with the segment."""

    claim: Claim
    over: bool = False


@dataclass
class Waiter:
    """A task that waits for segments, or for room for `room`."""

    task: asyncio.Task[Any]
    digests: list[bytes]
    segments: list[Segment] = field(default_factory=list)
    wanted: set[PageKey] = field(default_factory=set)
    lease: str = ""
    room: list[bytes] = field(default_factory=list)


class InterruptedPayload:
    """A page's bytes. While it is copied, without the store's lock, another thread does something."""

    def __init__(self, data: bytes, meanwhile: Any) -> None:
        self._data, self._meanwhile = data, meanwhile

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> bytes:
        self._meanwhile()
        return self._data[part]


class StoreProtocol(RuleBasedStateMachine):
    """Rules are what callers may do; what the store grants is entered in the model, and held against it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = InterleavingLoop()
        self.store = KvStore(LAYOUT, b"protocol", CAPACITY, clock=lambda: self.loop.now)
        self.leases: dict[str, ModelLease] = {}
        self.writers: list[Writer] = []
        self.pins: list[Segment] = []
        self.waiters: list[Waiter] = []
        self.lapsed: list[str] = []
        self.failed: dict[Segment, BagelError] = {}
        self.names = 0

    # Leases

    @initialize(digests=SOME, crowded=st.booleans())
    def begin(self, digests: list[bytes], crowded: bool) -> None:
        """Some leases, or a store that is full of complete segments, each under a lease of its own."""
        if not crowded:
            self.lease(digests, 3)
            return
        for digest in DIGESTS[:3]:
            self.lease([digest], 3)
            self.fill(self.stored().index(digest))

    @rule(digests=SOME, ttl_s=st.sampled_from([1, 3]))
    def lease(self, digests: list[bytes], ttl_s: float) -> None:
        self.expire()
        self.names += 1
        name = f"lease-{self.names}"
        room = fits(self.store, digests)
        try:
            self.store.lease([(each, LENGTHS[each]) for each in digests], ttl_s, name)
        except (StoreFull, InvalidRequest):
            assert not room, "room-is-given: what fits was refused"
            return
        self.granted(name, digests, ttl_s)

    @precondition(lambda self: self.leases)
    @rule(which=ANY, digests=SOME)
    def extend(self, which: int, digests: list[bytes]) -> None:
        name = self.a_lease(which)
        before = self.leases[name]
        runs = before.deadline > self.loop.now
        try:
            self.store.extend(name, [(each, LENGTHS[each]) for each in digests])
        except LeaseLapsed:
            assert not runs, "lapsed-not-served: a running lease was refused"
        except (StoreFull, InvalidRequest):
            pass
        else:
            assert runs, "lapsed-not-served: a lease that had run out was extended"
            for digest in digests:
                before.segments[digest] = self.now_stored(digest)
        self.expire()

    @precondition(lambda self: self.leases)
    @rule(which=ANY)
    def renew(self, which: int) -> None:
        name = self.a_lease(which)
        lease = self.leases[name]
        runs = lease.deadline > self.loop.now
        assert self.store.renew([name]) == ([] if runs else [name]), "lapsed-not-served: renewed after its time"
        if runs:
            lease.deadline = self.loop.now + lease.ttl_s
        self.expire()

    @precondition(lambda self: self.leases)
    @rule(which=ANY)
    def release(self, which: int) -> None:
        name = self.a_lease(which)
        self.store.release([name])
        del self.leases[name]

    @precondition(lambda self: self.lapsed)
    @rule(which=ANY)
    def a_lapsed_lease_stays_so(self, which: int) -> None:
        name = self.lapsed[which % len(self.lapsed)]
        assert self.store.renew([name]) == [name], "lapsed-not-served: renewed after its time"

    # Filling

    @precondition(lambda self: self.stored())
    @rule(which=ANY)
    def claim(self, which: int) -> None:
        digest = self.stored()[which % len(self.stored())]
        self.expire()
        try:
            granted = self.store.claim(digest)
        except BagelError:
            assert segment_of(self.store, digest) is None
            return
        segment = self.now_stored(digest)
        filled = any(not each.over and each.claim.segment is segment for each in self.writers)
        assert bool(granted) == (not segment.complete and not filled), "one-writer: two fill it, or nobody may"
        if granted:
            self.writers.append(Writer(granted))

    @precondition(lambda self: self.writers)
    @rule(which=ANY)
    def unclaim(self, which: int) -> None:
        """Also long after the claim was over, as a writer that ends late does."""
        writer = self.writers[which % len(self.writers)]
        self.store.unclaim(writer.claim)
        writer.over = True

    @precondition(lambda self: self.writers)
    @rule(which=ANY, page=ANY, meanwhile=st.sampled_from(["nothing", "release", "fail", "lease"]), other=ANY)
    def write(self, which: int, page: int, meanwhile: str, other: int) -> None:
        writer = self.writers[which % len(self.writers)]
        digest = writer.claim.digest
        layer, begin = PAGES[digest][page % len(PAGES[digest])]

        def interrupt() -> None:
            if meanwhile == "release" and self.leases:
                self.release(other)
            if meanwhile == "fail":
                self.fail(digest)
            if meanwhile == "lease":
                self.lease([DIGESTS[other % len(DIGESTS)]], 1)

        payload: Any = InterruptedPayload(content(digest, layer, begin), interrupt)
        try:
            self.store.write_page(digest, layer, begin, payload)
        except UnknownSegment:
            assert segment_of(self.store, digest) is None
        except NotFinite:
            assert any(segment.digest == digest for segment in self.failed)
        self.after_writing()

    @precondition(lambda self: self.writers)
    @rule(which=ANY)
    def write_all(self, which: int) -> None:
        for page in range(len(PAGES[self.writers[which % len(self.writers)].claim.digest])):
            self.write(which, page, "nothing", 0)

    @precondition(lambda self: self.stored())
    @rule(which=ANY)
    def fill(self, which: int) -> None:
        """A claim and all pages at once, so that there is cache to evict."""
        before = len(self.writers)
        self.claim(which)
        if len(self.writers) > before:
            self.write_all(before)

    @precondition(lambda self: self.writers)
    @rule(which=ANY)
    def fail_a_filling(self, which: int) -> None:
        self.fail(self.writers[which % len(self.writers)].claim.digest)

    def fail(self, digest: bytes) -> None:
        segment, error = segment_of(self.store, digest), NotFinite("overflow")
        self.store.fail(digest, error)
        if segment and segment.error is error:
            self.failed[segment] = error
            for writer in self.writers:
                writer.over |= writer.claim.segment is segment
        self.expire()

    # Reading

    @precondition(lambda self: self.stored())
    @rule(which=ANY)
    def pin(self, which: int) -> None:
        digest = self.stored()[which % len(self.stored())]
        self.expire()
        try:
            self.pins.append(self.store.pin(digest))
        except BagelError:
            assert segment_of(self.store, digest) is None

    @precondition(lambda self: self.pins)
    @rule(which=ANY)
    def unpin(self, which: int) -> None:
        self.store.unpin(self.pins.pop(which % len(self.pins)))

    def wait(self, digest: bytes) -> None:
        if segment := segment_of(self.store, digest):
            self.waiters.append(Waiter(self.loop.start(self.store.wait_segment(digest)), [digest], [segment]))
            self.loop.settle()

    @precondition(lambda self: self.writers)
    @rule(which=ANY)
    def wait_for_writer(self, which: int) -> None:
        self.wait(self.writers[which % len(self.writers)].claim.digest)

    @precondition(lambda self: self.leases)
    @rule(digests=SOME, which=ANY)
    def read(self, digests: list[bytes], which: int) -> None:
        wanted = {PageKey(each, *page) for each in digests for page in PAGES[each]}
        waiter = Waiter(self.loop.start(asyncio.sleep(0)), digests, wanted=wanted, lease=self.a_lease(which))
        waiter.task = self.loop.start(self.reading(waiter))
        self.waiters.append(waiter)

    @rule(digests=SOME, wait_s=st.sampled_from([0.3, 4]))
    def wait_for_room(self, digests: list[bytes], wait_s: float) -> None:
        self.waiters.append(Waiter(self.loop.start(self.rooming(digests, wait_s)), digests, room=digests))
        self.loop.settle()

    @precondition(lambda self: self.waiters)
    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        self.waiters[which % len(self.waiters)].task.cancel()

    # Time and order

    @rule(picks=PICKS)
    def run_some(self, picks: list[int]) -> None:
        for pick in picks:
            self.loop.step(pick)

    @rule(picks=PICKS)
    def run_all(self, picks: list[int]) -> None:
        self.loop.settle(picks)

    @rule(seconds=st.sampled_from([0.1, LOOK_AGAIN_S, 1.0, 3.0]), picks=PICKS)
    def pass_time(self, seconds: float, picks: list[int]) -> None:
        self.loop.pass_time(seconds, picks)
        self.expire()

    # What must hold

    @invariant()
    def books(self) -> None:
        self.expire()
        audit(self.store)
        assert not self.loop.failures, self.loop.failures

    @invariant()
    def nobody_sleeps_in_vain(self) -> None:
        """no-endless-wait: when no callback is ready, nobody waits for what is there."""
        if not self.loop.is_busy():
            self.check_waiters()

    @invariant()
    def what_is_used_stays(self) -> None:
        """in-use-stays: leased, claimed and pinned segments keep their memory and the bytes in it."""
        leased = {segment for lease in self.leases.values() for segment in lease.segments.values()}
        claimed = {each.claim.segment for each in self.writers if not each.over and not each.claim.segment.complete}
        for segment in leased | claimed:
            assert segment in self.failed or segment.stored, f"in-use-stays: {segment} is gone"
        memory = leased | claimed | set(self.pins)
        for segment in memory:
            for page in segment.ready if segment.stored or segment in self.pins else ():
                found = bytes_of(self.store, segment, page)
                assert found == content(segment.digest, *page), f"in-use-stays: {segment} page {page} was overwritten"
        for segment in claimed - self.failed.keys():
            assert segment.claimed, f"one-writer: {segment} lost its writer's claim"

    def teardown(self) -> None:
        """all-ends: once nobody holds anything, no waiter waits and nothing but complete cache is there."""
        self.store.release(list(self.leases))
        self.leases.clear()
        for writer in self.writers:
            self.store.unclaim(writer.claim)
        while self.pins:
            self.store.unpin(self.pins.pop())
        self.loop.pass_time(6)  # the longest wait, and the longest lease of one that got room at its end
        pending = [each for each in self.waiters if not each.task.done()]
        assert not pending, f"no-endless-wait: {pending}"
        self.store.release(list(self.leases))
        self.leases.clear()
        audit(self.store)
        stats = self.store.stats()
        assert (stats.leases, stats.held_bytes) == (0, 0), f"all-ends: {stats}"
        assert not self.store._ledger._orphans and not self.store._ledger.room_waiters
        left = self.store._ledger.segments.values()
        assert all(each.complete and each.idle and not each.waiters for each in left), "all-ends"
        assert not self.loop.failures, self.loop.failures
        self.loop.close()

    # The model's own

    async def reading(self, waiter: Waiter) -> None:
        self.store.stats()  # which drops what has run out
        waiter.segments = [segment for each in waiter.digests if (segment := segment_of(self.store, each))]
        async with aclosing(self.store.pages(list(waiter.wanted), waiter.lease)) as pages:
            async for page in pages:
                assert not isinstance(page, int)
                assert page.key in waiter.wanted, "each page once"
                assert bytes(page.k) + bytes(page.v) == content(*page.key), "in-use-stays: wrong bytes were served"
                waiter.wanted.discard(page.key)
        assert not waiter.wanted, "the stream ended early"

    async def rooming(self, digests: list[bytes], wait_s: float) -> None:
        self.names += 1
        name, segments = f"lease-{self.names}", [(each, LENGTHS[each]) for each in digests]
        await self.store.lease_in_time(segments, 3, name, wait_s=wait_s)
        self.granted(name, digests, 3)

    def granted(self, name: str, digests: list[bytes], ttl_s: float) -> None:
        held = {digest: self.now_stored(digest) for digest in digests}
        self.leases[name] = ModelLease(ttl_s, self.loop.now + ttl_s, held)

    def expire(self) -> None:
        """Time has passed in the model."""
        for name, lease in list(self.leases.items()):
            if lease.deadline <= self.loop.now:
                del self.leases[name]
                self.lapsed.append(name)

    def after_writing(self) -> None:
        for writer in self.writers:
            writer.over |= writer.claim.segment.complete

    def stored(self) -> list[bytes]:
        return [digest for digest in DIGESTS if segment_of(self.store, digest)]

    def a_lease(self, which: int) -> str:
        return list(self.leases)[which % len(self.leases)]

    def now_stored(self, digest: bytes) -> Segment:
        segment = segment_of(self.store, digest)
        assert segment, "what was granted is not there"
        return segment

    def check_waiters(self) -> None:
        for each in self.waiters:
            if each.task.done():
                self.check_end(each)
                continue
            gone = [segment for segment in each.segments if segment.error is not None]
            assert not gone, f"failure-wakes-all: a waiter of {gone} sleeps"
            if each.room:
                assert not fits(self.store, each.room), "no-endless-wait: a lease sleeps though there is room"
            elif each.wanted:
                ready = {PageKey(s.digest, *page) for s in each.segments for page in s.ready}
                assert not each.wanted & ready, "no-endless-wait: a reader sleeps though its page is there"
            else:
                (segment,) = each.segments
                assert segment.claimed and not segment.complete, "claim-passes-on: a waiter sleeps without a writer"
        self.waiters = [each for each in self.waiters if not each.task.done()]

    def check_end(self, waiter: Waiter) -> None:
        if waiter.task.cancelled() or (error := waiter.task.exception()) is None:
            return
        assert isinstance(error, BagelError), error
        if isinstance(error, NotFinite):
            causes = [cause for segment, cause in self.failed.items() if segment.digest in waiter.digests]
            assert error in causes, "failure-wakes-all: with another's cause"


StoreProtocol.TestCase.settings = settings(max_examples=1000, stateful_step_count=40, deadline=None)
TestStoreProtocol = StoreProtocol.TestCase
