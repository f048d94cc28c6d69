"""More callers than a gateway can serve: what is refused, how late the rest is, memory, and whether it is right.

Open loop: callers come by the clock (Poisson), not by answers. The callers are two processes of their own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.deployment.process import Service
from bagel.pipelines import BAGEL
from bench import load_callers
from bench.load_callers import Outcome, Plan
from bench.processes import cpu_of, resident_mib
from bench.report import Table

CALLERS = 2000
CALLER_PROCESSES = 2
PHASE_S = 15.0
SLOWER = 2.0
"""Limit: the median latency with all callers, over that with half of them."""
GROWTH = 1.1
"""Limit: memory of the last third of the soak, over the second third's."""
SAMPLE_S = 1.0
LOADS = (0.5, 1.0, 2.0, 4.0)
"""The load with an eighth, a quarter, half and all of the callers, in what is served at most."""
CLOSED_AT_ONCE = 8
NOTE = (
    f"{NANO_NAME}, Thinker, DiT and gateway; one Euler step or four tokens; a tenth of the callers leaves; limits: "
    f"every answer equals its undisturbed twin, the median of {CALLERS:,} callers is at most {SLOWER:g} times that of "
    "half as many"
)


@dataclass
class _Services:
    """What is measured of the services while callers call."""

    deployment: Deployment

    @property
    def gateway(self) -> Service:
        return self.deployment.services[-1]

    def resident(self) -> list[float]:
        return [resident_mib(service) for service in self.deployment.services]


def run(minutes: float, requests: int | None) -> Iterator[Table]:
    """Measure what is served, then call with ever more callers; then soak for some minutes.

    requests: what the gateway lets under way at once; None: as many as its stages have places.
    """
    settings: dict[str, Any] = {} if requests is None else {"max_requests": requests}
    _, checkpoint = find_model(NANO_NAME)
    config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
    spawn = multiprocessing.get_context("spawn")
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, checkpoint.folder, device="cpu", logs=nowhere, http="127.0.0.1:0", **settings) as deployment,
        ProcessPoolExecutor(CALLER_PROCESSES, spawn) as callers,
    ):
        address, http = deployment.address, deployment.http
        assert address and http
        twins = callers.submit(load_callers.twins, address, http).result()
        capacity = callers.submit(load_callers.capacity, address, http, CLOSED_AT_ONCE, PHASE_S).result()
        print(f"capacity: {capacity:.1f} requests a second, {CLOSED_AT_ONCE} at once", file=sys.stderr, flush=True)
        services = _Services(deployment)

        def phase(share: float, seconds: float) -> _Row:
            count = round(CALLERS * share / LOADS[-1])
            each = count // CALLER_PROCESSES
            plan = Plan(address, http, share * capacity / CALLER_PROCESSES, seconds, each, twins)
            return asyncio.run(_phase(services, callers, plan, count))

        yield _loads(phase(share, PHASE_S) for share in LOADS)
        yield _memory(f"all that is served for {minutes:g} min", deployment.services, phase(1.0, 60 * minutes))


def _loads(rows: Iterable[_Row]) -> Table:
    """Each load, beside the one before it."""
    table, last_ms, per_request_us = Table("load", NOTE), 0.0, 0.0
    for number, row in enumerate(rows):
        right, refused, wrong = (_of(row.outcomes, kind) for kind in ("right", "refused", "wrong"))
        p50_ms = _median([1e3 * each.seconds for each in right])
        refusal_us = None
        if number == 0:
            per_request_us = 1e6 * row.gateway_cpu_s / max(1, len(row.outcomes))
        elif len(refused) > len(right):
            rest = len(row.outcomes) - len(refused)
            refusal_us = (1e6 * row.gateway_cpu_s - per_request_us * rest) / len(refused)
        slow = number == len(LOADS) - 1 and p50_ms > SLOWER * last_ms
        table.add(
            callers=row.callers,
            a_second=len(row.outcomes) / PHASE_S,
            right=len(right),
            refused=len(refused),
            left=len(_of(row.outcomes, "left")),
            failed=len(_of(row.outcomes, "failed")),
            wrong=len(wrong),
            p50_ms=p50_ms,
            p99_ms=_p99([1e3 * each.seconds for each in right]),
            to_half=p50_ms / last_ms if last_ms else None,
            refused_p50_ms=_median([1e3 * each.seconds for each in refused]) if refused else None,
            refused_us=refusal_us,
            callers_cpu=row.callers_cpu_share,
            over="latency" if slow else "wrong" if wrong else "-",
            why=next((each.why for each in row.outcomes if each.kind in ("failed", "wrong")), ""),
        )
        table.failed |= slow or bool(wrong)
        last_ms = p50_ms
        print(table.rows[-1], file=sys.stderr, flush=True)
    return table


@dataclass
class _Row:
    """What came of one load."""

    callers: int
    outcomes: list[Outcome]
    gateway_cpu_s: float
    callers_cpu_share: float
    samples: list[list[float]]


async def _phase(services: _Services, callers: ProcessPoolExecutor, plan: Plan, count: int) -> _Row:
    loop, began, cpu = asyncio.get_running_loop(), time.monotonic(), cpu_of(services.gateway)
    calls = [loop.run_in_executor(callers, load_callers.call, plan, number) for number in range(CALLER_PROCESSES)]
    samples = []
    while not all(call.done() for call in calls):
        samples.append(services.resident())
        await asyncio.wait(calls, timeout=SAMPLE_S)
    told = [call.result() for call in calls]
    took = time.monotonic() - began
    outcomes = [each for outcomes, _ in told for each in outcomes]
    return _Row(count, outcomes, cpu_of(services.gateway) - cpu, max(seconds for _, seconds in told) / took, samples)


def _memory(note: str, services: Sequence[Service], row: _Row) -> Table:
    """Memory of each service in the last two thirds of a soak."""
    memory = Table("load: memory", f"{note}; MiB, resident")
    third = max(1, len(row.samples) // 3)
    wrong = sum(each.kind == "wrong" for each in row.outcomes)
    for number, service in enumerate(services):
        before = median(each[number] for each in row.samples[third : 2 * third] or row.samples)
        last = median(each[number] for each in row.samples[-third:])
        memory.add(
            service=service.name,
            second_third=before,
            last_third=last,
            ratio=last / before,
            answered=len(_of(row.outcomes, "right")),
            failed=len(_of(row.outcomes, "failed")),
            wrong=wrong,
        )
        memory.failed |= last > GROWTH * before or bool(wrong)
    return memory


def _of(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    return [each for each in outcomes if each.kind == kind]


def _median(values: Sequence[float]) -> float:
    return median(values) if values else 0.0


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else _median(values)
