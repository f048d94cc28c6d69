"""A DiT's runner, spoken to as its server does: every plan is answered, whatever goes wrong in it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import pytest
import torch
from google.rpc import status_pb2

from bagel import wire
from bagel.engine.denoise import Canvas
from bagel.engine.reader import Reader
from bagel.engine.text import TextBatch, TextRun
from bagel_dit.messages import (
    Alive,
    Begun,
    Command,
    Done,
    Drawn,
    Failed,
    Output,
    Planned,
    Read,
    Ready,
    Reply,
    RunnerSettings,
    Serve,
    Stepped,
    StepPlan,
    Stop,
    TextDone,
)
from bagel_dit.runner import Runner, load
from tests.conftest import GOLDEN
from tests.helpers import request

LIMIT_S = 30
READ = StepPlan((), read=True)


class Server:
    """The other end of a single stage's runner, which runs in a thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, command: Command) -> None:
        self._connection.send(command)

    def next(self) -> Reply:
        """The next reply that is about something."""
        while True:
            assert self._connection.poll(LIMIT_S), "the runner does not answer"
            reply: Reply = self._connection.recv()
            if not isinstance(reply, Alive):
                return reply

    def until(self, *kinds: type) -> list[Reply]:
        """Replies up to the first of these kinds."""
        replies = [self.next()]
        while not isinstance(replies[-1], kinds):
            replies.append(self.next())
        return replies

    def begin(self, id_: int, modality: str = "text2text", **options: Any) -> None:
        """Give the runner a request, up to where it is to be read."""
        asked = request(modality, **options)
        message = wire.request_to_wire(asked, (wire.part_to_wire(part) for part in asked.prompt))
        self.send(Serve(id_, message.SerializeToString(), Output()))
        assert self.until(Planned)[-1] == Planned(id_)
        self.send(Read(id_))

    def read(self) -> list[Reply]:
        """What comes of reading and writing until there is nothing left to do."""
        replies: list[Reply] = []
        while True:
            self.send(READ)
            replies += self.until(Stepped)
            if not replies[-1].reading:  # type: ignore[union-attr]
                return replies


@pytest.fixture
def server() -> Iterator[Server]:
    ours, theirs = multiprocessing.Pipe()
    settings = RunnerSettings(str(GOLDEN / "checkpoint"), True, "cpu", "auto", 4, None, False, "ERROR")
    thread = Thread(target=lambda: Runner(theirs, None, settings, load(settings)).run(), daemon=True)
    thread.start()
    server = Server(ours)
    assert isinstance(server.next(), Ready)
    yield server
    server.send(Stop())
    thread.join(LIMIT_S)
    ours.close()
    theirs.close()


def of(replies: list[Reply], kind: type) -> list[int]:
    """The requests that such replies are about."""
    return [reply.id for reply in replies if isinstance(reply, kind)]  # type: ignore[union-attr]


def failures(replies: list[Reply]) -> dict[int, str]:
    statuses = {reply.id: status_pb2.Status.FromString(reply.status) for reply in replies if isinstance(reply, Failed)}
    return {id_: status.message for id_, status in statuses.items()}


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
