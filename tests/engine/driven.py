"""An engine that a test drives command by command, as its scheduler and server do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.commands import AddRequest, Command, StepPlan
from bagel.engine.engine import Engine
from bagel.engine.events import Event, Failed, Planned, Stepped
from bagel.engine.loading import load_role
from bagel.images.output import OutputFormat
from tests.conftest import GOLDEN
from tests.helpers import request

LIMIT_S = 30
LOOK_S = 0.05
READ = StepPlan((), read=True, begin=(1, 2))
"""A unit of reading that begins with the first two requests, if they are planned and not over."""


class Driven:
    """An engine and its events."""

    def __init__(self, engine: Engine, events: SimpleQueue[Event]) -> None:
        self.engine, self._events = engine, events
        self._planned: list[int] = []

    def send(self, command: Command) -> None:
        self.engine.execute(command)

    def next(self) -> Event:
        """The next event."""
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            try:
                event = self._events.get(timeout=LOOK_S)
            except Empty:
                self.engine.look()
                continue
            if isinstance(event, Planned):
                self._planned.append(event.id)
            return event
        raise AssertionError("the engine emits nothing")

    def until(self, *kinds: type) -> list[Event]:
        """Events up to the first of these kinds."""
        events = [self.next()]
        while not isinstance(events[-1], kinds):
            events.append(self.next())
        return events

    def begin(self, id_: int, modality: str = "text2text", **options: Any) -> Event:
        """Add a request; what its planning came to."""
        self.send(AddRequest(id_, request(modality, **options), OutputFormat("PNG")))
        return self.until(Planned, Failed)[-1]

    def read(self) -> list[Event]:
        """What comes of reading and writing until there is nothing left to do."""
        events: list[Event] = []
        while True:
            begin, self._planned = tuple(self._planned), []
            self.send(StepPlan((), read=True, begin=begin))
            events += self.until(Stepped)
            if isinstance(events[-1], Stepped) and not events[-1].reading:
                return events


@contextmanager
def driven(
    pages: torch.Tensor | None = None,
    device: str = "cpu",
    kv_device_bytes: int | None = None,
    profile: bool = False,
) -> Iterator[Driven]:
    """An engine on the recordings' checkpoint. pages: memory that K/V arrive in, of one that draws from contexts."""
    loaded = load_role(
        Checkpoint(GOLDEN / "checkpoint"),
        Role.FULL if pages is None else Role.DENOISE,
        dtype=torch.float32,
        device=torch.device(device),
    )
    events: SimpleQueue[Event] = SimpleQueue()
    engine = Engine(loaded, events.put, max_num_seqs=4, kv_device_bytes=kv_device_bytes, pages=pages, profile=profile)
    yield Driven(engine, events)
    engine.close()


def of(events: Sequence[Event], kind: type) -> list[int]:
    """The requests that such events are about."""
    return [event.id for event in events if isinstance(event, kind)]  # type: ignore[union-attr]


def failures(events: Sequence[Event]) -> dict[int, str]:
    """Errors of requests."""
    return {event.id: str(event.error) for event in events if isinstance(event, Failed)}
