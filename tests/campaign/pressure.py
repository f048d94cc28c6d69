"""Whether this machine had time for the services under test: where others had the CPUs, the clock proves nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tests.campaign.watch import children

MOST = 0.2
"""The share of all CPUs that others may use, a hypervisor's guests included."""
_BUSY = (0, 1, 2, 5, 6, 7)
"""Of /proc/stat: user, nice, system, irq, softirq, steal."""


class Pressure:
    """What others than our child processes, and theirs, use of the CPUs from now on. pids: says which live."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._began, self._busy, self._own = time.monotonic(), _busy(), self._used()

    def others(self) -> float:
        """Their share of all CPUs; 0 where the machine does not tell."""
        seconds = time.monotonic() - self._began
        ticks = seconds * (os.cpu_count() or 1) * os.sysconf("SC_CLK_TCK")
        return max(0.0, (_busy() - self._busy) - (self._used() - self._own)) / max(ticks, 1.0)

    def _used(self) -> int:
        own = sum(map(_ticks, (os.getpid(), *self._pids())))
        return own + sum(_ticks(child) for pid in self._pids() for child in _children(pid))


def _busy() -> int:
    with suppress(OSError):
        counts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        return sum(int(counts[i]) for i in _BUSY)
    return 0


def _ticks(pid: int) -> int:
    """Those of a process, and of its children that have ended."""
    with suppress(OSError):
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return 0


def _children(pid: int) -> tuple[int, ...]:
    with suppress(OSError):
        return children(pid)
    return ()
