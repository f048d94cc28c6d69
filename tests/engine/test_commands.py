"""An engine answers every plan, whatever goes wrong in it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from bagel.engine.commands import AddRequest, Remove, StepPlan
from bagel.engine.events import Begun, Done, Drawn, Planned, Stepped, TextDone
from bagel.engine.plan import RequestPlan
from bagel.engine.sampler import Canvas
from bagel.engine.single_stage import SingleStage
from bagel.engine.text import TextBatch, TextRun
from bagel.engine.text_scheduler import ContextRequest, TextScheduler
from bagel.request import Request
from tests.engine.driven import READ, Driven, driven, failures, of
from tests.helpers import request


@pytest.fixture
def engine() -> Iterator[Driven]:
    with driven() as engine:
        yield engine


def test_a_text_without_room_ends_alone_and_its_plans_are_answered(
    engine: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = TextBatch.add

    def full(batch: TextBatch, run: TextRun) -> None:
        if run.settings.max_tokens > 3:
            raise torch.OutOfMemoryError
        add(batch, run)

    monkeypatch.setattr(TextBatch, "add", full)
    engine.begin(1, max_tokens=3)
    engine.begin(2, max_tokens=300)
    engine.begin(3, max_tokens=3)
    replies = engine.read()
    assert of(replies, Done) == [1, 3]
    assert failures(replies).keys() == {2} and "memory of the device is full" in failures(replies)[2]


def test_a_text_scheduler_that_fails_fails_its_requests_and_the_next_ones_work(
    engine: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(scheduler: TextScheduler) -> None:
        raise RuntimeError("out of luck")

    engine.begin(1, max_tokens=3)
    engine.begin(2, "text2img", think=True)
    with monkeypatch.context() as patch:
        patch.setattr(TextScheduler, "work", broken)
        engine.send(READ)
        replies = engine.until(Stepped)
    assert failures(replies).keys() == {1, 2}
    assert all("internal error: RuntimeError" in message for message in failures(replies).values())
    assert replies[-1] == Stepped(reading=False)  # so that no more plans are made for them
    engine.begin(3, max_tokens=3)
    assert of(engine.read(), Done) == [3]


def test_a_step_that_fails_fails_its_pictures_and_is_answered(engine: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(canvas: Canvas, pictures: list[int]) -> None:
        raise RuntimeError("out of luck")

    engine.begin(1, "text2img", steps=3)
    assert of(engine.read(), Begun) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "step", broken)
        engine.send(StepPlan((1,), read=False))
        replies = engine.until(Stepped)
    assert failures(replies).keys() == {1} and replies[-1] == Stepped(reading=False)
    engine.begin(2, "text2img", steps=3)
    assert of(engine.read(), TextDone) == [2]
    for _ in range(2):
        engine.send(StepPlan((2,), read=False))
    assert of(engine.until(Drawn), Drawn) == [2]


def test_a_request_that_cannot_begin_ends_alone(engine: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    add = TextScheduler.add

    def broken(scheduler: TextScheduler, asked: ContextRequest) -> None:
        if asked.settings is not None and asked.settings.max_tokens == 2:
            raise RuntimeError("out of luck")
        add(scheduler, asked)

    monkeypatch.setattr(TextScheduler, "add", broken)
    for id_, tokens in ((1, 3), (2, 2), (3, 3)):
        engine.begin(id_, max_tokens=tokens)
    replies = engine.read()
    assert of(replies, Done) == [1, 3] and failures(replies).keys() == {2}


class _SlowId(int):
    """An id that takes its time to be compared, in which other threads run."""

    def __ne__(self, other: object) -> bool:
        time.sleep(0.02)
        return int(self) != other

    def __eq__(self, other: object) -> bool:
        return not self != other

    __hash__ = int.__hash__


def test_a_request_that_leaves_takes_no_other_with_it(engine: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are planned meanwhile, in a thread of its own."""
    plan = SingleStage.plan

    def slow(stage: SingleStage, asked: Request) -> RequestPlan:
        time.sleep(0.005)
        return plan(stage, asked)

    monkeypatch.setattr(SingleStage, "plan", slow)
    for id_ in range(30):
        engine.send(AddRequest(id_, request("text2text", max_tokens=1)))
    events = engine.until(Planned)
    engine.send(Remove(_SlowId(1000)))
    while len(of(events, Planned)) < 30:
        events.append(engine.next())
    assert not failures(events)
    assert sorted(of(engine.read(), Done)) == list(range(30))
