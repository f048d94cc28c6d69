"""Attack a real gateway, Thinker and DiT, and measure what an ordinary client notices."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

from bagel.client import AsyncClient
from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.deployment.process import Service
from bagel.errors import BagelError, ConfigError
from bagel.pipelines import BAGEL
from bench import attack_grpc, attack_http
from bench.attack_http import Target
from bench.nano import cpu_seconds
from bench.processes import cpu_of, processes
from bench.report import Table

MIB = 2**20
QUIET_S, ATTACK_S, LATE_S = 4.0, 10.0, 20.0
"""Seconds to measure before an attack, to attack, and to wait for one answer to the quiet client."""
# Unread pictures are ordinary work until they are drawn, so the measurement starts when they are.
DRAWING_S = 6.0
EVERY_S = 0.25
GATEWAY_MIB = 1024.0
"""The gateway's memory limit in the shipped compose file."""
SLOWER, LEAST_MS = 2.0, 100.0
HEALTHZ_MS = 1000.0
NOTE = (
    f"{NANO_NAME}, Thinker, DiT and gateway; each attack for {ATTACK_S:g} s. Limits: rss_mib, the gateway's peak, "
    f"{GATEWAY_MIB:g}; during_ms, a quiet client's median, {SLOWER:g} times quiet_ms or {LEAST_MS:g} if that is more; "
    f"healthz_ms, the slowest, {HEALTHZ_MS:g}. A request of the quiet client that failed counts as {LATE_S:g} s"
)

Attack = Callable[[Target], Awaitable[str]]
ATTACKS: Mapping[str, Attack] = {
    "http: 20-digit Content-Length": attack_http.huge_length,
    "http: 4 pictures of 64 MP a chat": attack_http.large_pictures,
    "http: JPEG of 1,000 scans": attack_http.many_scans,
    "http: 60 MiB of JSON objects": attack_http.many_json_values,
    "http: deep JSON": attack_http.deep_json_values,
    "http: 64 streams not read": attack_http.unread_streams,
    "http: 800 silent connections": attack_http.silent,
    "http: 600 trickling connections": attack_http.trickling,
    "grpc: 63 pictures of 64 MP": attack_grpc.large_pictures,
    "grpc: 4 JPEGs of 1,000 scans": attack_grpc.many_scans,
    "grpc: 64 streams not read": attack_grpc.unread,
    "grpc: half messages": attack_grpc.half_messages,
    "grpc: messages that are not taken": attack_grpc.half_messages_in_windows,
    "grpc: calls without a request": attack_grpc.calls_without_a_request,
    "grpc: 1,500 silent connections": attack_grpc.silent,
    "grpc: 2,000 watches": attack_grpc.watches,
    "grpc: 2,000 reflections": attack_grpc.reflections,
    "grpc: health checks without a pause": attack_grpc.checks,
}


def run(only: str) -> Iterator[Table]:
    """Carry out every attack whose name contains `only`; ConfigError if there is none."""
    names = [name for name in ATTACKS if only in name]
    if not names:
        raise ConfigError(f"--only {only!r} names no attack; they are: {'; '.join(ATTACKS)}")
    table = Table("attacks", NOTE)
    _, checkpoint = find_model(NANO_NAME)
    config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
    spawn = multiprocessing.get_context("spawn")
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, checkpoint.folder, device="cpu", logs=nowhere, http="127.0.0.1:0") as services,
        # In another process with low priority: the attacker's own work must not slow down the services.
        ProcessPoolExecutor(1, spawn, initializer=os.nice, initargs=(15,)) as attacker,
    ):
        for name in names:
            asyncio.run(_measure(table, name, services, attacker))
            print(table.rows[-1], file=sys.stderr, flush=True)
            services.check()
    yield table


async def _measure(table: Table, name: str, services: Deployment, attacker: ProcessPoolExecutor) -> None:
    lead_s = DRAWING_S if "not read" in name else 0.0
    before = await _Quiet(services).ask_for(QUIET_S)
    for service in services.services:
        _forget_peak(service)
    cpu, own_cpu = cpu_seconds(services), cpu_of(services.services[-1])
    target = Target(services.address, services.http, ATTACK_S + lead_s)
    attack = asyncio.get_running_loop().run_in_executor(attacker, _attack, name, target)
    await asyncio.sleep(lead_s)
    during = await _Quiet(services).ask_for(ATTACK_S)
    outcome = await attack
    peaks = [_peak_mib(service) for service in services.services]
    quiet_ms, during_ms = before.median_ms, during.median_ms
    limit_ms = max(SLOWER * quiet_ms, LEAST_MS)
    over = {
        "rss": peaks[-1] > GATEWAY_MIB,
        "median": during_ms > limit_ms,
        "healthz": during.healthz_ms > HEALTHZ_MS,
    }
    table.add(
        attack=name,
        quiet_ms=quiet_ms,
        during_ms=during_ms,
        healthz_ms=during.healthz_ms,
        failed=during.failed,
        rss_mib=peaks[-1],
        others_mib=sum(peaks[:-1]),
        cpu_s=cpu_of(services.services[-1]) - own_cpu,
        all_cpu_s=cpu_seconds(services) - cpu,
        over=", ".join(what for what, passed in over.items() if passed) or "-",
        came_of_it=f"{outcome}; {during.why}" if during.why else outcome,
    )
    table.failed |= any(over.values())


def _attack(name: str, target: Target) -> str:
    """Run one attack, in the attacker's process."""
    return asyncio.run(_carry_out(name, target))


async def _carry_out(name: str, target: Target) -> str:
    try:
        return await ATTACKS[name](target)
    except (OSError, TimeoutError, BagelError) as error:  # as text, since not all of them can be pickled
        return f"{type(error).__name__}: {error}"


class _Quiet:
    """An ordinary client that regularly asks for a short text and checks /healthz."""

    def __init__(self, services: Deployment) -> None:
        self._services = services
        self._latencies: list[float] = []
        self._healthz: list[float] = []
        self.failed = 0
        self.why = ""
        """The error of the first request that failed."""

    @property
    def median_ms(self) -> float:
        """The median latency of the answers; without any, the time that the client waits for one."""
        return 1e3 * (median(self._latencies) if self._latencies else LATE_S)

    @property
    def healthz_ms(self) -> float:
        """The slowest check."""
        return 1e3 * max(self._healthz, default=LATE_S)

    async def ask_for(self, seconds: float) -> _Quiet:
        """Ask repeatedly for some seconds."""
        ends = time.monotonic() + seconds
        await asyncio.gather(self._ask(ends), self._look(ends))
        return self

    async def _ask(self, ends: float) -> None:
        """Send a request every EVERY_S."""
        # Without waiting for earlier answers: a client that waits would send, and count, only one slow request.
        async with AsyncClient(self._services.address) as client, asyncio.TaskGroup() as group:
            while time.monotonic() < ends:
                group.create_task(self._ask_once(client))
                await asyncio.sleep(EVERY_S)

    async def _ask_once(self, client: AsyncClient) -> None:
        began = time.perf_counter()
        try:
            await client.generate("a large red circle", modality="text2text", max_tokens=2, timeout=LATE_S)
            self._latencies.append(time.perf_counter() - began)
        except BagelError as error:
            self._latencies.append(LATE_S)
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        self.failed += 1
        self.why = self.why or why

    async def _look(self, ends: float) -> None:
        host, _, port = self._services.http.rpartition(":")
        request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        while time.monotonic() < ends:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(LATE_S):
                    reader, writer = await asyncio.open_connection(host, int(port))
                    writer.write(request)
                    answer = await reader.read()
                    writer.close()
                if not answer.startswith(b"HTTP/1.1 200"):
                    self._fail(f"/healthz: {answer[:20]!r}")
            except (OSError, TimeoutError) as error:
                self._fail(f"/healthz: {type(error).__name__}")
            self._healthz.append(time.perf_counter() - began)
            await asyncio.sleep(EVERY_S)


def _forget_peak(service: Service) -> None:
    for path in processes(service):
        with suppress(OSError):
            (path / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def _peak_mib(service: Service) -> float:
    """The sum of its processes' peaks since then: an upper bound of what a container would count."""
    total = 0
    for path in processes(service):
        with suppress(OSError):
            lines = (path / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return total * 1024 / MIB
