"""A DiT's runner, spoken to as its server does: every plan is answered, whatever goes wrong in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bagel.engine.sampler import Canvas
from bagel.engine.text import TextBatch, TextRun
from bagel.engine.text_scheduler import Reader
from bagel_dit.messages import Begun, Done, Drawn, Stepped, StepPlan, TextDone
from tests.dit.runner_server import READ, Server, failures, of, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def test_a_text_without_room_ends_alone_and_its_plans_are_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = TextBatch.add

    def full(batch: TextBatch, run: TextRun) -> None:
        if run.settings.max_tokens > 3:
            raise torch.OutOfMemoryError
        add(batch, run)

    monkeypatch.setattr(TextBatch, "add", full)
    server.begin(1, max_tokens=3)
    server.begin(2, max_tokens=300)
    server.begin(3, max_tokens=3)
    replies = server.read()
    assert of(replies, Done) == [1, 3]
    assert failures(replies).keys() == {2} and "memory of the device is full" in failures(replies)[2]


def test_a_reader_that_fails_fails_its_requests_and_the_next_ones_work(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reader: Reader) -> None:
        raise RuntimeError("out of luck")

    server.begin(1, max_tokens=3)
    server.begin(2, "text2img", think=True)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "work", broken)
        server.send(READ)
        replies = server.until(Stepped)
    assert failures(replies).keys() == {1, 2}
    assert all("internal error: RuntimeError" in message for message in failures(replies).values())
    assert replies[-1] == Stepped({}, reading=False)  # so that no more plans are made for them
    server.begin(3, max_tokens=3)
    assert of(server.read(), Done) == [3]


def test_a_step_that_fails_fails_its_pictures_and_is_answered(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(canvas: Canvas, pictures: list[int]) -> None:
        raise RuntimeError("out of luck")

    server.begin(1, "text2img", steps=3)
    assert of(server.read(), Begun) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "step", broken)
        server.send(StepPlan((1,), read=False))
        replies = server.until(Stepped)
    assert failures(replies).keys() == {1} and replies[-1] == Stepped({}, reading=False)
    server.begin(2, "text2img", steps=3)
    assert of(server.read(), TextDone) == [2]
    for _ in range(2):
        server.send(StepPlan((2,), read=False))
    assert of(server.until(Drawn), Drawn) == [2]
