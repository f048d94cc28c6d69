"""More callers than a gateway can serve: what is refused, how late the rest is, memory, and whether it is right.

Open loop: callers come by the clock (Poisson), not by answers. The callers are two processes of their own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
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
"""Limit: the median latency at full load, over that at half the load."""
GROWTH = 1.1
"""Limit: memory of the last third of the soak, over the first third's."""
SAMPLE_S = 1.0
OVERLOAD = 4.0
CLOSED_AT_ONCE = 16
NOTE = (
    f"{NANO_NAME}, Thinker, DiT and gateway; one Euler step or four tokens; {CALLERS:,} callers, a tenth leaves; "
    f"limits: every answer equals its undisturbed twin, latency at full load {SLOWER:g} times that at half"
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
    """Measure capacity, then half of it, all of it, and several times as much; then soak for some minutes.

    requests: what the gateway lets under way at once; None: as many as its stages have places.
    """
    settings: dict[str, Any] = {} if requests is None else {"max_requests": requests}
    table, memory = Table("load", NOTE), Table("load: memory", f"full load for {minutes:g} min; MiB, resident")
    _, checkpoint = find_model(NANO_NAME)
    config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
    spawn = multiprocessing.get_context("spawn")
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, checkpoint.folder, device="cpu", logs=nowhere, http="127.0.0.1:0", **settings) as deployment,
        ProcessPoolExecutor(CALLER_PROCESSES, spawn) as callers,
    ):
        services = _Services(deployment)
        address, http = deployment.address, deployment.http
        assert address and http
        twins = callers.submit(load_callers.twins, address, http).result()
        capacity = callers.submit(load_callers.capacity, address, http, CLOSED_AT_ONCE, PHASE_S).result()
        print(f"capacity: {capacity:.1f} requests a second, {CLOSED_AT_ONCE} at once", file=sys.stderr, flush=True)
        per_request_us, half_ms = 0.0, 0.0
        for name, share in (("half", 0.5), ("full", 1.0), ("overload", OVERLOAD)):
            plan = Plan(address, http, share * capacity / CALLER_PROCESSES, PHASE_S, CALLERS // CALLER_PROCESSES, twins)
            row = asyncio.run(_phase(services, callers, plan))
            answered, refused = _of(row.outcomes, "right"), _of(row.outcomes, "refused")
            wrong = [each for each in row.outcomes if each.kind == "wrong"]
            late_ms = [1e3 * each.seconds for each in answered]
            refusal_us = None
            if name == "half":
                per_request_us = 1e6 * row.gateway_cpu_s / max(1, len(row.outcomes))
                half_ms = _median(late_ms)
            elif len(refused) > len(answered):
                rest = len(row.outcomes) - len(refused)
                refusal_us = 1e6 * row.gateway_cpu_s / len(refused) - per_request_us * rest / len(refused)
            slow = name == "full" and _median(late_ms) > SLOWER * half_ms
            table.add(
                load=name,
                a_second=share * capacity,
                asked=len(row.outcomes),
                right=len(answered),
                refused=len(refused),
                left=len(_of(row.outcomes, "left")),
                failed=len(_of(row.outcomes, "failed")),
                wrong=len(wrong),
                p50_ms=_median(late_ms),
                p99_ms=_p99(late_ms),
                refused_p50_ms=_median([1e3 * each.seconds for each in refused]),
                refused_us=refusal_us,
                callers_cpu=row.callers_cpu_share,
                over="latency" if slow else "wrong" if wrong else "-",
                why=next((each.why for each in row.outcomes if each.kind in ("failed", "wrong")), ""),
            )
            table.failed |= slow or bool(wrong)
            print(table.rows[-1], file=sys.stderr, flush=True)
        yield table
        plan = Plan(address, http, capacity / CALLER_PROCESSES, 60 * minutes, CALLERS // CALLER_PROCESSES, twins)
        row = asyncio.run(_phase(services, callers, plan))
        _add_memory(memory, deployment.services, row)
        yield memory


@dataclass
class _Row:
    outcomes: list[Outcome]
    gateway_cpu_s: float
    callers_cpu_share: float
    samples: list[list[float]]


async def _phase(services: _Services, callers: ProcessPoolExecutor, plan: Plan) -> _Row:
    loop, began, cpu = asyncio.get_running_loop(), time.monotonic(), cpu_of(services.gateway)
    calls = [loop.run_in_executor(callers, load_callers.call, plan, number) for number in range(CALLER_PROCESSES)]
    samples = []
    while not all(call.done() for call in calls):
        samples.append(services.resident())
        await asyncio.wait(calls, timeout=SAMPLE_S)
    told = [call.result() for call in calls]
    took = time.monotonic() - began
    outcomes = [each for outcomes, _ in told for each in outcomes]
    return _Row(outcomes, cpu_of(services.gateway) - cpu, max(seconds for _, seconds in told) / took, samples)


def _add_memory(memory: Table, services: Sequence[Service], row: _Row) -> None:
    third = max(1, len(row.samples) // 3)
    wrong = sum(each.kind == "wrong" for each in row.outcomes)
    for number, service in enumerate(services):
        first = median(each[number] for each in row.samples[third : 2 * third] or row.samples)
        last = median(each[number] for each in row.samples[-third:])
        memory.add(service=service.name, second_third=first, last_third=last, ratio=last / first, wrong=wrong)
        memory.failed |= last > GROWTH * first or bool(wrong)


def _of(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    return [each for each in outcomes if each.kind == kind]


def _median(values: Sequence[float]) -> float:
    return median(values) if values else 0.0


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98] if len(values) > 1 else _median(values)
