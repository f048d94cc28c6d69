"""The stages of a picture that is profiled: what they are called, and which denoise steps one has. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

WINDOW = 10
"""Denoise steps of one window."""
BEFORE = ("context", "text", "transfer")
"""Stages before the first step, of which a topology has some."""


def windows(steps: int) -> Iterator[tuple[int, int]]:
    """The first and the last step, from 1, of each window."""
    for first in range(1, steps + 1, WINDOW):
        yield first, min(first + WINDOW - 1, steps)


def window_stages(steps: int, seconds: Sequence[float]) -> dict[str, float]:
    """The stages of the windows with their seconds: `denoise 1-10` and so on."""
    return {f"denoise {first}-{last}": each for (first, last), each in zip(windows(steps), seconds, strict=True)}


def stages_before(timings: Mapping[str, float]) -> dict[str, float]:
    """What was done before the first step, of a request's timings."""
    return {stage: timings[stage] for stage in BEFORE if stage in timings}


def steps_of(stage: str) -> int | None:
    """How many steps a stage has; None for one without."""
    name, _, span = stage.partition(" ")
    if name != "denoise":
        return None
    first, _, last = span.partition("-")
    return int(last) - int(first) + 1
