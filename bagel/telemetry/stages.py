"""The stages of a profiled picture: their names, and the denoise steps that each covers. No torch here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 10
"""Denoise steps per window."""
BEFORE = ("context", "text", "transfer")
"""The stages before the first step; not every topology has all of them."""


def windows(steps: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last step of each window, counted from 1."""
    for first in range(1, steps + 1, WINDOW):
        yield first, min(first + WINDOW - 1, steps)


def window_stages(steps: int, seconds: Sequence[float]) -> dict[str, float]:
    """Name the windows' durations by stage: `denoise 1-10` and so on."""
    return {f"denoise {first}-{last}": each for (first, last), each in zip(windows(steps), seconds, strict=True)}


def stages_before(timings: Mapping[str, float]) -> dict[str, float]:
    """The stages before the first step, from a request's timings."""
    return {stage: timings[stage] for stage in BEFORE if stage in timings}


def steps_of(stage: str) -> int | None:
    """The number of denoise steps in a stage; None for a stage of another kind."""
    name, _, span = stage.partition(" ")
    if name != "denoise":
        return None
    first, _, last = span.partition("-")
    return int(last) - int(first) + 1


@dataclass
class StageClock:
    """Where the time of a request goes. began: when its present stage began, by time.perf_counter."""

    began: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""

    def lap(self, stage: str) -> tuple[float, float]:
        """Count the time since the last lap to a stage, and begin the next; when the stage began and ended."""
        began, self.began = self.began, time.perf_counter()
        self.timings[stage] = self.timings.get(stage, 0.0) + self.began - began
        return began, self.began
