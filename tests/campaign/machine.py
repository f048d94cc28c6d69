"""Faults of processes and of what the machine gives them: signals, limits, clocks, disks, files of a checkpoint."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

from tests.campaign.faults import Fault
from tests.campaign.fleet import Fleet
from tests.campaign.watch import children

MEMORY_MORE = 4 << 20
"""Bytes of address space that a process that runs out of memory may still take."""
YEAR_S = 365 * 86400
_ONE_AT_A_TIME: defaultdict[tuple[int, int], asyncio.Lock] = defaultdict(asyncio.Lock)
"""For a process and one of its limits."""


async def happen(fault: Fault, fleet: Fleet) -> bool:
    """Do it, and undo what does not stay so; whether it could be done."""
    service = fleet.services[fault.place].process
    if service.poll() is not None:
        return False
    try:
        return await _do(fault, fleet, service)
    except (FileNotFoundError, ProcessLookupError):  # in /proc: another fault has ended it meanwhile
        return False


async def _do(fault: Fault, fleet: Fleet, service: Popen[str]) -> bool:
    match fault.kind:
        case "kill-runner":
            return _signal(runner(service.pid, fault.number), signal.SIGKILL)
        case "kill-service":
            return _signal(service.pid, signal.SIGKILL)
        case "drain":
            return _signal(service.pid, signal.SIGTERM)
        case "stop-runner":
            return await _stop(runner(service.pid, fault.number), fault.seconds)
        case "stop-service" | "stop-long":
            return await _stop(service.pid, fault.seconds)
        case "memory":
            pid = runner(service.pid, fault.number) if fault.number % 2 else service.pid
            size = int(Path(f"/proc/{pid or service.pid}/statm").read_text().split()[0]) * resource.getpagesize()
            return await limit(pid, resource.RLIMIT_AS, size + MEMORY_MORE, fault.seconds)
        case "files":
            count = len(os.listdir(f"/proc/{service.pid}/fd"))
            return await limit(service.pid, resource.RLIMIT_NOFILE, count, fault.seconds)
        case "clock":
            if fleet.clock.here:
                fleet.clock.jump(fault.place, (fault.number % 5 - 2 or 3) * (YEAR_S if fault.number % 2 else 3600))
            return fleet.clock.here
        case "disk":  # nothing can be written while it starts: the cache of digests, above all
            return await _start_with(fleet, fault.place, 0)
        case "shared-memory":
            return await _start_with(fleet, fault.place, 1 << 16)
        case "checkpoint":
            return await _other_checkpoint(fleet, fault)
        case _:
            raise AssertionError(fault.kind)


def runner(pid: int, which: int = 0) -> int:
    """The process that runs a DiT's model, or one of them: the largest children. 0 if there is none."""
    found = sorted(children(pid), key=_size, reverse=True)
    ranks = [each for each in found if 2 * _size(each) > _size(found[0])]
    return ranks[which % len(ranks)] if ranks else 0


def _size(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return 0


def _signal(pid: int, number: signal.Signals) -> bool:
    if not pid:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


async def _stop(pid: int, seconds: float) -> bool:
    if not _signal(pid, signal.SIGSTOP):
        return False
    try:
        await asyncio.sleep(seconds)
    finally:
        _signal(pid, signal.SIGCONT)
    return True


async def limit(pid: int, what: int, value: int, seconds: float) -> bool:
    """Set a process's limit for a while.

    Two faults set it one after the other: at the same time, the later would restore what the earlier has set.
    """
    if not pid:
        return False
    async with _ONE_AT_A_TIME[pid, what]:
        return await _set_limit(pid, what, value, seconds)


async def _set_limit(pid: int, what: int, value: int, seconds: float) -> bool:
    with suppress(OSError):
        soft, hard = resource.prlimit(pid, what)
        resource.prlimit(pid, what, (value if hard < 0 else min(value, hard), hard))
        try:
            await asyncio.sleep(seconds)
        finally:
            with suppress(OSError):  # it may have ended
                resource.prlimit(pid, what, (soft, hard))
        return True
    return False


async def _start_with(fleet: Fleet, name: str, file_bytes: int) -> bool:
    """Start a service again while no file may be larger than so many bytes; it ends with one clear line, or serves."""
    await fleet.respawn(name)
    pid = fleet.services[name].process.pid
    with suppress(OSError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (file_bytes, hard))
    return True


async def _other_checkpoint(fleet: Fleet, fault: Fault) -> bool:
    """Change the weights on disk under a running DiT, and have it load them again."""
    file = fleet.models[fault.place] / "ema.safetensors"
    data = bytearray(file.read_bytes())
    at = len(data) - 4 * (1 + fault.number % 10000)
    data[at + 2] ^= 0x7F  # within a weight, so that it is another model and a file as good as before
    # Whole at once: another fault of the round may read it meanwhile.
    new = file.with_name(f"{file.name}.{fault.number}")
    await asyncio.to_thread(new.write_bytes, data)
    new.replace(file)
    return _signal(runner(fleet.services[fault.place].process.pid, fault.number), signal.SIGKILL)
