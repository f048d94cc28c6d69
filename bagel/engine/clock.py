"""The device's clock: moments of its work, marked without waiting for it and read once it is done."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from bagel.telemetry.stages import WINDOW, window_stages

Moment = float | torch.cuda.Event
"""A reading of time.perf_counter on a CPU, whose work is done when the call returns; on a GPU a place in its stream."""
Piece = tuple[Moment, Moment]
"""When a piece of work began and ended."""


def mark(device: torch.device) -> Moment:
    """The moment after all work that was launched so far on the present stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(device: torch.device) -> None:
    """Wait until all work that was launched so far on the present stream is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def seconds_between(begin: Moment, end: Moment) -> float:
    """Seconds from one moment to another, of one device; waits until the latter has come."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class WindowClock:
    """Times the windows of one picture's steps. A mark every WINDOW steps is all that it does meanwhile."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device, self._steps = device, steps
        self._marks: list[Moment] = []

    def reach(self, step: int) -> None:
        """Take note that `step` steps are launched, just before the next one, if there is one."""
        if step % WINDOW == 0 or step == self._steps:
            self._marks.append(mark(self._device))

    def stages(self) -> dict[str, float]:
        """Seconds of each window; waits until the last step is done."""
        return window_stages(self._steps, [seconds_between(*pair) for pair in pairwise(self._marks)])
