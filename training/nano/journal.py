"""The clock of a training stage, and its log as JSON lines."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path


class Journal:
    """Logs a stage to a file and to standard output."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage, self.start = path, stage, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: object) -> None:
        """Write one line, with numbers rounded."""
        entry = {"stage": self.stage, "s": round(time.monotonic() - self.start, 1), **values}
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()})
        print(line, flush=True)
        with self.path.open("a") as stream:  # opened for each line, so that a stopped run loses none
            stream.write(line + "\n")


class Schedule:
    """The learning rates' factor over a stage: a short linear rise, then half a cosine from `start` to `end`.

    It follows the clock, not the steps, so that a stage ends at its low rate however fast the machine is.
    """

    def __init__(self, minutes: float, start: float, end: float, rise: int) -> None:
        self.until = time.monotonic() + 60 * minutes
        self.begun = time.monotonic()
        self.start, self.end, self.rise = start, end, rise

    def begin(self) -> None:
        """Start the cosine here, after the time that compiling took."""
        self.begun = time.monotonic()

    @property
    def progress(self) -> float:
        return min(1.0, (time.monotonic() - self.begun) / max(1e-6, self.until - self.begun))

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def scale(self, step: int) -> float:
        """The factor at a step of this stage."""
        height = self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return height * min(1.0, (step + 1) / max(1, self.rise))
