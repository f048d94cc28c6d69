"""A rank one of whose threads hangs reports it; one that is only slow does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from bagel.engine import single_stage
from bagel.engine.commands import AddRequest, Command, StepPlan
from bagel.engine.events import Begun, Drawn, Planned, Stepped
from bagel.engine.sampler import Canvas
from bagel.engine.text_scheduler import TextScheduler
from bagel.engine.vae_worker import VaeWorker
from bagel.images.output import OutputFormat
from bagel.model.mot import MoTLayer
from bagel_dit.workers.messages import Alive, Hung, Report
from bagel_dit.workers.rank import beat_in_layers
from bagel_dit.workers.watch import Watch
from tests.engine.driven import READ, Driven, driven, of
from tests.helpers import request

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

LIMIT_S = 1.0


class Watched:
    """An engine whose commands run in a thread, as in a rank, and its watch."""

    def __init__(self, engine: Driven) -> None:
        self._engine = engine.engine
        self._reports: SimpleQueue[Report] = engine._events  # type: ignore[assignment]
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        beat_in_layers(self._engine.loaded.model, self._engine.heartbeat)
        watch = Watch(self._engine.heartbeat, LIMIT_S, self._reports.put)
        watch.loading = False
        watch.start()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            self._engine.execute(command)

    def send(self, command: Command | None) -> None:
        self._commands.put(command)

    def until(self, *kinds: type) -> list[Report]:
        """Reports up to the first of these kinds, but for those that the process runs."""
        reports: list[Report] = []
        while not reports or not isinstance(reports[-1], kinds):
            report = self._reports.get(timeout=30)
            if not isinstance(report, Alive):
                reports.append(report)
        return reports


@contextmanager
def watched() -> Iterator[Watched]:
    with driven() as engine:
        watched = Watched(engine)
        yield watched
        watched.send(None)


def draw(rank: Watched) -> None:
    """Begin a picture, up to where it takes steps."""
    rank.send(AddRequest(1, request("text2img", steps=2), OutputFormat("PNG")))
    rank.until(Planned)
    reports: list[Report] = []
    while not of(reports, Begun):  # type: ignore[arg-type]
        rank.send(READ)
        reports = rank.until(Stepped)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Canvas, "step"), (TextScheduler, "work"), (VaeWorker, "_image"), (single_stage, "plan_request")],
)
def test_work_that_hangs_is_reported_with_where_it_is(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    work = getattr(owner, name)

    def hang_here(*args: Any, **options: Any) -> Any:
        over.wait()
        return work(*args, **options)

    with watched() as rank:
        if owner in (Canvas, VaeWorker):
            draw(rank)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, hang_here)
            if owner in (Canvas, VaeWorker):
                rank.send(StepPlan((1,), read=False))
            else:
                rank.send(AddRequest(1, request("text2img", steps=2), OutputFormat("PNG")))
                if owner is TextScheduler:
                    rank.until(Planned)
                    rank.send(READ)
            try:
                hung = rank.until(Hung)[-1]
            finally:
                over.set()
        assert isinstance(hung, Hung) and not hung.loading
        assert "hang_here" in hung.stack


def test_a_step_that_takes_long_but_gets_on_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MoTLayer.forward

    def slowly(*args: Any) -> Any:
        time.sleep(LIMIT_S / 2)
        return forward(*args)

    with watched() as rank:
        draw(rank)
        time.sleep(1.5 * LIMIT_S)  # without work
        with monkeypatch.context() as patch:
            patch.setattr(MoTLayer, "forward", slowly)
            began = time.monotonic()
            rank.send(StepPlan((1,), read=False))
            reports = rank.until(Drawn)
        assert time.monotonic() - began > 1.5 * LIMIT_S
        assert not [report for report in reports if isinstance(report, Hung)]
