"""Time and losses of a stage: how far it is, and JSON lines of how it goes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path


class Journal:
    """Writes to a file and to standard output."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage, self.start = path, stage, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values: object) -> None:
        """One line; numbers are rounded."""
        entry = {"stage": self.stage, "s": round(time.monotonic() - self.start, 1), **values}
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()})
        print(line, flush=True)
        with self.path.open("a") as stream:
            stream.write(line + "\n")


class Schedule:
    """Rates over a stage's time: a short rise, then from one height to another along half a cosine."""

    def __init__(self, minutes: float, start: float, end: float, rise: int) -> None:
        self.until = time.monotonic() + 60 * minutes
        self.begun = time.monotonic()
        self.start, self.end, self.rise = start, end, rise

    def begin(self) -> None:
        """The time for compiling is over."""
        self.begun = time.monotonic()

    @property
    def progress(self) -> float:
        return min(1.0, (time.monotonic() - self.begun) / max(1e-6, self.until - self.begun))

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def scale(self, step: int) -> float:
        """The rates' factor at a step of this stage."""
        height = self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return height * min(1.0, (step + 1) / max(1, self.rise))
