"""A Thinker's store, a DiT's, and the puller between them, in any order and with any loss (docs/kv-protocol.md)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bagel.errors import BagelError, IncompleteContext, NotFinite
from bagel.kv.codec import PAGE_VERSION
from bagel.kv.pages import PageKey
from bagel.kv.puller import KvPuller
from bagel.kv.segment import Claim
from bagel.kv.service import KvBlocksServicer
from bagel.kv.store import KvStore
from bagel.v1 import kv_pb2
from tests.kv.protocol.books import DIGESTS, LAYOUT, LENGTHS, PAGES, audit, bytes_of, content, segment_of
from tests.kv.protocol.channel import Link
from tests.kv.protocol.interleaving import InterleavingLoop

ROOM_THERE, ROOM_HERE = 1024, 448
TTL_S, PAGE_TIMEOUT_S, ROOM_WAIT_S = 2.0, 1.0, 1.5
pytestmark = pytest.mark.slow

PICKS = st.lists(st.integers(0, 5), max_size=15)
SOME = st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=3, unique=True)
ANY = st.integers(0, 99)
CROWD = "crowd-"
LONGEST_S = 60.0
"""Virtual seconds after which no request may still be under way, once its K/V come or fail."""


@dataclass
class Drawing:
    """One request: a task that holds its contexts, fetches and checks them, and keeps them until `done`."""

    digests: list[bytes]
    done: asyncio.Event
    task: asyncio.Task[None] | None = None
    fetched: bool = False


class ExactlyOnce(KvStore):
    """Notes which pages come in, and whether their segment has a writer then."""

    def write_page(self, digest: bytes, layer: int, token_begin: int, payload: memoryview) -> None:
        segment = segment_of(self, digest)
        assert segment is None or (layer, token_begin) not in segment.ready, "one-flight: a page came twice"
        super().write_page(digest, layer, token_begin, payload)


class PullProtocol(RuleBasedStateMachine):
    """Rules are what requests, the engine there, the network and time may do."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = InterleavingLoop()
        self.there = KvStore(LAYOUT, b"protocol", ROOM_THERE, clock=lambda: self.loop.now)
        self.here = ExactlyOnce(LAYOUT, b"protocol", ROOM_HERE, clock=lambda: self.loop.now)
        self.link = Link(KvBlocksServicer(self.there))
        self.puller = self.loop.call(
            lambda: KvPuller(
                self.here,
                {"thinker": self.link},  # type: ignore[dict-item]
                page_timeout_s=PAGE_TIMEOUT_S,
                room_wait_s=ROOM_WAIT_S,
                lease_ttl_s=TTL_S,
            )
        )
        self.drawings: list[Drawing] = []
        self.builds: list[Claim] = []
        self.crowds = self.lost = self.broken = 0

    @initialize(digests=SOME)
    def begin(self, digests: list[bytes]) -> None:
        self.draw(digests)

    # Requests

    @rule(digests=SOME)
    def draw(self, digests: list[bytes]) -> None:
        """The Thinker leases, and the DiT is called with the reference."""
        try:
            lease = self.there.lease([(each, LENGTHS[each]) for each in digests], TTL_S)
        except BagelError:
            return
        ref = kv_pb2.ContextRef(
            source="thinker",
            lease_id=lease,
            lease_seconds=TTL_S,
            segments=[kv_pb2.SegmentRef(digest=each, length=LENGTHS[each]) for each in digests],
            fingerprint=b"protocol",
            page_version=PAGE_VERSION,
        )
        drawing = Drawing(digests, asyncio.Event())
        drawing.task = self.loop.start(self.drawing(drawing, ref))
        self.drawings.append(drawing)

    @precondition(lambda self: self.drawings)
    @rule(which=ANY)
    def finish(self, which: int) -> None:
        self.drawings[which % len(self.drawings)].done.set()

    @precondition(lambda self: self.drawings)
    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        task = self.drawings[which % len(self.drawings)].task
        assert task
        task.cancel()

    # The engine there

    @rule(digest=st.sampled_from(DIGESTS))
    def build(self, digest: bytes) -> None:
        if segment_of(self.there, digest) and (claim := self.there.claim(digest)):
            self.builds.append(claim)

    @precondition(lambda self: self.builds)
    @rule(which=ANY, pages=st.integers(1, 8))
    def compute(self, which: int, pages: int) -> None:
        digest = self.builds[which % len(self.builds)].digest
        segment = segment_of(self.there, digest)
        missing = [page for page in PAGES[digest] if segment and page not in segment.ready]
        for layer, begin in missing[:pages]:
            self.there.write_page(digest, layer, begin, memoryview(content(digest, layer, begin)))

    @precondition(lambda self: self.builds)
    @rule(which=ANY)
    def give_up(self, which: int) -> None:
        self.there.unclaim(self.builds.pop(which % len(self.builds)))

    @precondition(lambda self: self.builds)
    @rule(which=ANY)
    def fail(self, which: int) -> None:
        self.there.fail(self.builds.pop(which % len(self.builds)).digest, NotFinite("overflow"))

    # The network, and what else happens

    @rule(at=ANY, bit=st.integers(0, 7))
    def damage(self, at: int, bit: int) -> None:
        def flip(data: bytes) -> bytes:
            place = at % len(data)
            return data[:place] + bytes((data[place] ^ 1 << bit,)) + data[place + 1 :]

        self.link.damage.append(flip)
        self.lost += 1

    @rule()
    def lose(self) -> None:
        self.link.damage.append(lambda data: None)
        self.lost += 1

    @rule()
    def cut(self) -> None:
        self.broken += 1
        for stream in list(self.link.streams):
            self.loop.call(stream.cut)

    @rule(down=st.booleans())
    def disconnect(self, down: bool) -> None:
        self.broken += down
        self.link.down = down

    @rule(digest=st.sampled_from(DIGESTS))
    def crowd(self, digest: bytes) -> None:
        """Another user of the store here takes room for a while."""
        try:
            self.crowds += 1
            self.here.lease([(bytes(15) + digest[:1], LENGTHS[digest])], 1, f"{CROWD}{self.crowds}")
        except BagelError:
            return

    @rule(seconds=st.sampled_from([2.5, 5.0]))
    def stand_still(self, seconds: float) -> None:
        """The process is stopped: time passes, and nothing runs. Leases lapse."""
        self.loop.now += seconds

    @rule(picks=PICKS)
    def run_some(self, picks: list[int]) -> None:
        for pick in picks:
            self.loop.step(pick)

    @rule(picks=PICKS)
    def run_all(self, picks: list[int]) -> None:
        self.loop.settle(picks)

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0]), picks=PICKS)
    def pass_time(self, seconds: float, picks: list[int]) -> None:
        self.loop.pass_time(seconds, picks)

    # What must hold

    @invariant()
    def books(self) -> None:
        audit(self.there)
        audit(self.here)
        assert not self.loop.failures, self.loop.failures

    @invariant()
    def what_is_there_is_right(self) -> None:
        """in-use-stays, never-wrong: whatever is ready here or there has the right bytes."""
        for store in (self.here, self.there):
            for digest in DIGESTS:
                if segment := segment_of(store, digest):
                    for page in segment.ready:
                        assert bytes_of(store, segment, page) == content(digest, *page), f"never-wrong: {page}"

    @invariant()
    def no_page_is_under_way_twice(self) -> None:
        """one-flight: the streams that run ask for each page once."""
        asked: list[PageKey] = [
            PageKey(digest, *page) for s in self.link.streams if s.wanted for digest, page in s.pages(PAGES)
        ]
        assert len(asked) == len(set(asked)), f"one-flight: {asked}"

    @invariant()
    def who_is_done_holds_nothing(self) -> None:
        """all-ends: at once, and not only when its leases run out."""
        if all(each.task and each.task.done() for each in self.drawings) and not self.loop.is_busy():
            left = [name for name in self.here._ledger.leases if not name.startswith(CROWD)]
            assert not left and not self.puller._fetches, f"all-ends: {left}"

    def teardown(self) -> None:
        """all-ends: the engine finishes what is wanted, the network works, and every request ends; nothing is held."""
        self.link.down = False
        self.link.damage.clear()
        for _ in range(len(DIGESTS)):
            for digest in DIGESTS:
                self.build(digest)
            while self.builds:
                self.compute(0, 99)
                self.builds.pop(0)
        for drawing in self.drawings:
            drawing.done.set()
        self.loop.pass_time(LONGEST_S)
        self.loop.finish(self.puller.close())
        pending = [each for each in self.drawings if each.task and not each.task.done()]
        assert not pending, f"no-endless-wait: {pending}"
        for drawing in self.drawings:
            assert drawing.task
            if not drawing.task.cancelled() and (error := drawing.task.exception()):
                assert isinstance(error, BagelError), repr(error)
                missing = type(error) is IncompleteContext
                assert not missing or self.broken or self.lost > 1, f"asked-again: one lost page failed it: {error}"
        for store in (self.here, self.there):
            audit(store)
            stats = store.stats()
            assert (stats.leases, stats.held_bytes, stats.pulls) == (0, 0, 0), f"all-ends: {stats}"
            left = store._ledger.segments.values()
            assert all(each.complete and each.idle and not each.waiters for each in left), f"all-ends: {left}"
            assert not store._ledger._orphans and not store._ledger.room_waiters, "all-ends"
        assert not self.puller._fetches and not self.link.streams, "all-ends"
        assert not self.loop.failures, self.loop.failures
        self.loop.close()

    async def drawing(self, drawing: Drawing, ref: kv_pb2.ContextRef) -> None:
        async with self.puller.hold([ref]) as held:
            await held.fetch()
            drawing.fetched = True
            self.right(drawing)
            await drawing.done.wait()
            held.check()
            # lapsed-not-served: whoever passes the check has what it fetched, unmoved.
            self.right(drawing)

    def right(self, drawing: Drawing) -> None:
        for digest in drawing.digests:
            segment: Any = segment_of(self.here, digest)
            assert segment and segment.complete, f"lapsed-not-served: {digest!r} is not there under a running lease"
            for page in PAGES[digest]:
                assert bytes_of(self.here, segment, page) == content(digest, *page), "never-wrong"


PullProtocol.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPullProtocol = PullProtocol.TestCase
