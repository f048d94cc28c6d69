"""What services hold, from outside: their counters, descriptors, threads, child processes and use of the CPU."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from bagel.errors import BagelError
from bagel.rpc.transport import channel
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from tests.campaign import http
from tests.campaign.workload import Front

if TYPE_CHECKING:
    from tests.campaign.fleet import Fleet

FILES_MORE, THREADS_MORE = 20, 24
"""How many more a process may have than it had when it first came to rest: pools fill as they are needed."""
READERS = 2
"""Processes that read images: they are started when the first image comes, and again after one has ended."""
_GAUGE = re.compile(rb'^(bagel_[a-z_]+)(?:\{backend="([^"]+)"\})? ([0-9.e+]+)$', re.M)


@dataclass(frozen=True)
class Use:
    """What one service has, with its children. cpu: ticks that they have used."""

    pid: int
    files: int
    threads: int
    children: tuple[int, ...]
    cpu: int


def front_of(fleet: Fleet, name: str, *, direct: bool = False) -> Front:
    """Where a gateway is called, through its links unless said otherwise."""
    security = fleet.security(name)
    if direct:
        return Front(fleet.direct(name), fleet.services[name].http, security)
    links = fleet.links
    return Front(links[f"client>{name}/grpc"].address, links[f"client>{name}/http"].address, security)


def serving(fleet: Fleet, name: str) -> bool:
    """Whether a gateway has said that it is ready."""
    return bool(fleet.services[name].http)


async def gauges(fleet: Fleet, name: str) -> dict[tuple[str, str], float]:
    """A gateway's metrics that have no label but the backend."""
    front = front_of(fleet, name, direct=True)
    async with asyncio.timeout(5):
        _, text = await http.call(front.http, "GET", "/metrics", b"", "", front.security)
    return {(m[1].decode(), (m[2] or b"").decode()): float(m[3]) for m in _GAUGE.finditer(text)}


async def backends_ready(fleet: Fleet, name: str) -> int:
    """How many services a gateway finds ready."""
    try:
        found = await gauges(fleet, name)
    except (BagelError, TimeoutError):
        return 0
    return int(sum(value for (gauge, _), value in found.items() if gauge == "bagel_backend_ready"))


async def stats(fleet: Fleet, name: str) -> kv_pb2.GetStatsResponse:
    """What a store has counted."""
    async with channel(fleet.direct(name), fleet.security(name), fleet_role(name)) as connection:
        return await KvBlocksServiceStub(connection).GetStats(kv_pb2.GetStatsRequest(), timeout=5)


def fleet_role(name: str) -> str | None:
    """The name in a stage's certificate."""
    return "dit" if name == "single" else name.partition("-")[0] if "-" in name else None


async def held(fleet: Fleet) -> list[str]:
    """What is still counted as under way."""
    from tests.campaign.fleet import DITS, FRONTS, THINKERS

    left: list[str] = []
    for name in (*THINKERS, *DITS):
        try:
            now = await stats(fleet, name)
        except grpc.RpcError as error:
            left.append(f"{name}: no counters ({error.code().name})")
            continue
        found = {each: getattr(now, each) for each in ("held_bytes", "leases", "pulls")}
        left += [f"{name}: {each} is {value}" for each, value in found.items() if value]
    for name in FRONTS:
        for (gauge, backend), value in (await gauges(fleet, name)).items():
            if value and gauge in ("bagel_requests_under_way", "bagel_requests_waiting", "bagel_backend_requests"):
                left.append(f"{name}: {gauge} {backend} is {value:g}")
    return left


def use(pid: int) -> Use | None:
    """What a process and its children have; None if it has ended."""
    try:
        own = children(pid)
        every = (pid, *own)
        return Use(pid, _count(pid, "fd"), _count(pid, "task"), own, sum(map(_ticks, every)))
    except (OSError, ValueError):
        return None


def grown(before: Use, now: Use) -> list[str]:
    """What a service has too much of, next to when it was first at rest."""
    found = []
    if now.files > before.files + FILES_MORE:
        found.append(f"{now.files} descriptors, first {before.files}: {_kinds(now.pid)}")
    if now.threads > before.threads + THREADS_MORE:
        found.append(f"{now.threads} threads, first {before.threads}")
    if len(now.children) > len(before.children) + READERS:
        found.append(f"{len(now.children)} child processes, first {len(before.children)}")
    return found


def _kinds(pid: int) -> str:
    """What a process's descriptors are, by kind; of connections, by their own port and state."""
    kinds: Counter[str] = Counter()
    connections = _connections(pid)
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            link = os.readlink(f"/proc/{pid}/fd/{name}")
            kinds[connections.get(link, link.partition(":")[0])] += 1
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(9))


def _connections(pid: int) -> dict[str, str]:
    """Of TCP sockets: their own port, and their state as Linux numbers it (1 is established, 8 waits to be closed)."""
    found = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            port, state = int(fields[1].rpartition(":")[2], 16), int(fields[3], 16)
            found[f"socket:[{fields[9]}]"] = f"port {port} state {state}"
    return found


def orphans(known: set[int], folder: Path) -> list[str]:
    """Processes of the fleet of that folder that no service has any more."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) not in known:
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
                if b"multiprocessing" in command and bytes(folder / "clock-") in environment:
                    found.append(f"process {entry.name} has lost its service")
    return found


def children(pid: int) -> tuple[int, ...]:
    """The child processes of a process."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return tuple(sorted(found))


def _count(pid: int, what: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{what}"))


def _ticks(pid: int) -> int:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0
