"""The scheduler against an engine whose threads and pipe take their turns in any order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from bagel.engine.commands import StepPlan
from bagel.engine.events import Begun, Event, Planned, Stepped
from bagel.engine.scheduler import PLANS_AHEAD, Scheduler

BUDGET = 30
TURNS = ("plan", "announce", "work", "report", "deliver")
"""Of the planner's thread, of the engine's and of the server; what a thread does in two parts can be divided."""


@dataclass
class Asked:
    """A request: units of text, and then a picture's steps if it has any."""

    text: int
    steps: int
    bucket: int
    rows: int
    taken: int = 0


@dataclass
class System:
    """The scheduler, and the engine with its threads and pipe."""

    asked: dict[int, Asked]
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(BUDGET))
    plans: deque[StepPlan] = field(default_factory=deque)
    events: deque[Event] = field(default_factory=deque)
    added: list[int] = field(default_factory=list)
    reading: list[int] = field(default_factory=list)
    drawing: list[int] = field(default_factory=list)
    removed: set[int] = field(default_factory=set)
    stepped: Stepped | None = None
    under_way: int = 0
    next: int = 0

    def plan(self) -> None:
        """The planner's thread makes a request known to the engine's, before it says so."""
        if self.next in self.asked and not self.added:
            if self.next not in self.removed:
                self.reading.append(self.next)
                self.added.append(self.next)
            self.next += 1

    def announce(self) -> None:
        if self.added:
            self.events.append(Planned(self.added.pop()))

    def work(self) -> None:
        """The engine carries out a plan up to where it has looked whether there is text left."""
        if self.stepped is not None or not self.plans:
            return
        plan = self.plans.popleft()
        sizes = [self.asked[id_].bucket * self.asked[id_].rows for id_ in plan.pictures]
        assert len(sizes) <= 1 or sum(sizes) <= BUDGET
        assert len({self.asked[id_].bucket for id_ in plan.pictures}) <= 1
        for id_ in plan.pictures:
            if id_ in self.drawing:
                self._step(id_)
        if plan.read and self.reading:
            self._read(self.reading[0])
        self.stepped = Stepped(bool(self.reading))

    def report(self) -> None:
        if self.stepped is not None:
            self.events.append(self.stepped)
            self.stepped = None

    def deliver(self) -> None:
        """The scheduler hears of an event, and plans on."""
        if not self.events:
            return
        event = self.events.popleft()
        self.under_way -= isinstance(event, Stepped)
        if isinstance(event, Stepped) or event.id not in self.removed:  # type: ignore[union-attr]
            self.scheduler.observe(event)
        while (plan := self.scheduler.plan()) is not None:
            self.under_way += 1
            assert self.under_way <= PLANS_AHEAD
            self.plans.append(plan)

    def remove(self, id_: int) -> None:
        """A caller has left."""
        self.removed.add(id_)
        self.scheduler.remove(id_)
        for ids in (self.reading, self.drawing):
            if id_ in ids:
                ids.remove(id_)

    def _read(self, id_: int) -> None:
        asked = self.asked[id_]
        asked.text -= 1
        if asked.text <= 0:
            self.reading.remove(id_)
            if asked.steps:
                self.drawing.append(id_)
                self.events.append(Begun(id_, asked.steps, asked.bucket, asked.rows))

    def _step(self, id_: int) -> None:
        asked = self.asked[id_]
        asked.taken += 1
        assert asked.taken <= asked.steps
        if asked.taken == asked.steps:
            self.drawing.remove(id_)


requests = st.builds(
    Asked, st.integers(1, 2), st.sampled_from((0, 0, 1, 4)), bucket=st.sampled_from((4, 8, 40)), rows=st.integers(1, 3)
)
leaving = st.dictionaries(st.integers(0, 24), st.integers(0, 5), max_size=3)


@settings(max_examples=500, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6), st.integers(0, 2**32), leaving)
def test_every_request_ends_and_no_plan_is_too_many(asked: list[Asked], seed: int, leaving: dict[int, int]) -> None:
    system, order = System(dict(enumerate(asked))), Random(seed)
    for number in range(200):
        for turn in order.sample(TURNS, len(TURNS)):
            if turn != "plan" or order.random() < 0.3:  # most requests come when all before them are done
                getattr(system, turn)()
        if number in leaving:
            system.remove(leaving[number])
    assert not (system.plans or system.events or system.under_way), "plans go on though there is nothing to do"
    for id_, each in system.asked.items():
        assert id_ in system.removed or (each.text <= 0 and each.taken == each.steps)


def test_the_next_token_needs_no_round_trip_and_a_text_that_is_over_no_plan() -> None:
    scheduler = Scheduler()
    scheduler.observe(Planned(1))
    plans = [scheduler.plan() for _ in range(PLANS_AHEAD)]
    assert plans == [StepPlan((), read=True, begin=(1,)), StepPlan((), read=True)] and scheduler.plan() is None
    scheduler.observe(Stepped(reading=True))
    assert scheduler.plan() == StepPlan((), read=True)
    for _ in range(PLANS_AHEAD):
        scheduler.observe(Stepped(reading=False))
    assert scheduler.plan() is None
