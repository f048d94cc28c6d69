"""CPU and memory of a service with its children, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bagel.deployment.process import Service

KIB_PER_MIB = 1024


def processes(service: Service) -> Iterator[Path]:
    """The /proc folders of a service's process and of its children."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process may have ended meanwhile
            if int((path / "stat").read_text().rpartition(")")[2].split()[2]) == service.process.pid:
                yield path


def cpu_of(service: Service) -> float:
    """CPU-seconds so far."""
    ticks = 0
    for path in processes(service):
        with suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(service: Service) -> float:
    """Memory that is resident now; what processes share is counted in each."""
    total = 0
    for path in processes(service):
        with suppress(OSError):
            lines = (path / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return total / KIB_PER_MIB
