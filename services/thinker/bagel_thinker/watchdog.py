"""Whether the engine's thread makes progress: one that hangs raises no error that would show it."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from bagel.errors import EngineDied
from bagel.telemetry.logs import Log

if TYPE_CHECKING:
    from bagel_thinker.engine import Engine

LOOK_S = 1.0

log = Log("bagel.thinker")


class Pulse:
    """Which step a thread is at; None while it waits for work. Written by that thread, read by any.

    beside: of a thread that works for this one; both are waiting for work only if each of them is.
    """

    def __init__(self, beside: Pulse | None = None) -> None:
        self._step: int | None = None
        self._steps, self._beside = 0, beside

    @property
    def step(self) -> tuple[int | None, ...] | None:
        """What changes with every step; None while there is none."""
        steps = (self._step,) if self._beside is None else (self._step, self._beside._step)
        return None if steps.count(None) == len(steps) else steps

    def beat(self) -> None:
        """A step begins."""
        # A number, so that two looks tell a new step from the same one.
        self._steps += 1
        self._step = self._steps

    def rest(self) -> None:
        """There is nothing to do."""
        self._step = None


async def watch(engine: Engine, limit_s: float) -> None:
    """Fail the engine once one step has taken limit_s, and return; its thread is lost.

    Only time in which this runs counts: a process that was stopped for a while has not hung.
    """
    # Several looks fit into a short limit too.
    look_s = min(LOOK_S, limit_s / 4)
    seen, waited = engine.pulse.step, 0.0
    while waited < limit_s:
        await asyncio.sleep(look_s)
        now = engine.pulse.step
        # Counted in looks, not by the clock, which goes on while a process is stopped.
        waited = waited + look_s if now is not None and now == seen else 0.0
        seen = now
    log.error("the engine hangs", step_timeout=limit_s, stack=_stack(f"{engine.name}-engine"))
    if not engine.failed.done():
        engine.failed.set_exception(
            EngineDied(f"the Thinker's engine has hung for {limit_s:g} s, and the service ends; try again")
        )


def _stack(name: str) -> str:
    """Where that thread is."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name == name and thread.ident in frames:
            return "".join(traceback.format_stack(frames[thread.ident]))
    return ""
