"""Compare two pieces of work on a CPU that other processes use too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

Work = Callable[[], object]

SHORTEST_SAMPLE_S = 0.1
"""Shorter work is repeated within a sample, so that the clock's resolution does not matter."""
SHORTEST_CASE_S = 6.0
"""Short work gets more samples, up to this total time, since an interruption distorts it more."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: wall time, and CPU time of all threads of the process."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Comparison:
    """Interleaved samples of our work and of its control, in pairs."""

    ours: tuple[Sample, ...]
    control: tuple[Sample, ...]

    @property
    def ours_s(self) -> float:
        return median(sample.wall for sample in self.ours)

    @property
    def control_s(self) -> float:
        return median(sample.wall for sample in self.control)

    @property
    def ratio(self) -> float:
        """The median wall time of our work, divided by the control's."""
        return self.ours_s / self.control_s

    @property
    def cpu_ratio(self) -> float:
        """The median CPU-seconds of our work, divided by the control's."""
        return median(sample.cpu for sample in self.ours) / median(sample.cpu for sample in self.control)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and the upper quartile of the wall-time ratio within a pair."""
        low, _, high = quantiles((a.wall / b.wall for a, b in zip(self.ours, self.control, strict=True)), n=4)
        return low, high


def compare(ours: Work, control: Work, repeats: int) -> Comparison:
    """Run both twice to warm up, then A B A B …, with at least `repeats` samples of each (two or more)."""
    # Interleaved, so that a change in the machine's load hits both alike.
    (ours_s, ours_calls), (control_s, control_calls) = _plan(ours), _plan(control)
    count = max(repeats, math.ceil(SHORTEST_CASE_S / (ours_s * ours_calls + control_s * control_calls)))
    pairs = [(_sample(ours, ours_calls), _sample(control, control_calls)) for _ in range(count)]
    return Comparison(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def _plan(work: Work) -> tuple[float, int]:
    """The seconds of a second call, and the number of calls per sample."""
    work()
    seconds = _sample(work, 1).wall
    return seconds, max(1, math.ceil(SHORTEST_SAMPLE_S / seconds))


def _sample(work: Work, calls: int) -> Sample:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        work()
    return Sample((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)
