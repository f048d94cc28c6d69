"""One round: its requests and its faults at once, then peace, then the verdicts."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from bagel.errors import BagelError
from bagel.rpc.transport import channel
from tests.campaign import machine, peers, watch
from tests.campaign.faults import FRAMES, Fault, Round
from tests.campaign.fleet import DITS, FRONTS, STAGES, TWIN_FRONT, Fleet, running_pids
from tests.campaign.judge import Late, shown, verdict
from tests.campaign.pressure import MOST, Pressure
from tests.campaign.proxy import NetFault
from tests.campaign.workload import Ask, Outcome, send

BYTES_BEFORE, FRAMES_BEFORE = 700, 6
"""At most so much passes before a fault of the network."""
STARTS, READY_S = 3, 120.0
"""How often what has ended is started again, and how long it has until it is ready."""
REST_S = 10.0
"""How soon after the last request all services are as they were."""
NOTICED_S = 5.0
"""How soon a service knows that its runner has ended."""
ENDING, ENDS_S = ("drain", "checkpoint", "shared-memory", "disk"), 60.0
"""Faults after which a service ends by itself, and how soon."""
QUIET_S, QUIET_TICKS = 0.15, 6
"""A stage at rest uses less than so many hundredths of a second in that time."""
PROBES = (
    Ask("text2img", "a probe", 1),
    Ask("text2text", "a probe", 2),
    Ask("text2img", "a probe", 1, single=True),
    Ask("img2img", "a probe", 3, image=1),
)
"""Sent after each round, and answered right: whatever a round did, nothing of it is left."""


@dataclass
class Verdict:
    """What came of a round. wrong: each failure in one line; ends: how requests ended.

    others: the share of the CPUs that others than the services had.
    """

    round: Round
    fired: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    s: float = 0.0
    others: float = 0.0

    @property
    def undecided(self) -> bool:
        """Whether all that is wrong is so by the clock, while others had the CPUs."""
        return bool(self.wrong) and self.others > MOST and all(isinstance(each, Late) for each in self.wrong)


class Campaign:
    """Rounds against one fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._twins: dict[Ask, Outcome] = {}
        self._at_twin = asyncio.Semaphore(4)  # its places, so that it refuses nobody
        self._first: dict[int, watch.Use] = {}

    async def run(self, round_: Round) -> Verdict:
        """Run a round to its verdict."""
        began, found = time.perf_counter(), Verdict(round_)
        pressure = Pressure(running_pids)
        requests = [asyncio.create_task(self._ask(at, each)) for at, each in round_.asks]
        doing = [asyncio.create_task(self._do(fault, found)) for fault in round_.faults]
        armed = await asyncio.gather(*doing)
        outcomes = await asyncio.gather(*requests)
        for fault, net in zip(round_.faults, armed, strict=True):
            if net is not None and net.fired:
                found.fired[fault.group, fault.kind] += 1
        # One that was armed and hit nothing excuses nothing.
        happened = tuple(f for f, net in zip(round_.faults, armed, strict=True) if net is None or net.fired)
        await asyncio.gather(self._heal(found), *(self._twin(each.ask) for each in outcomes if each.answer is not None))
        await self._judge(outcomes, replace(round_, faults=happened), found)
        await self._at_rest(found)
        found.s, found.others = time.perf_counter() - began, pressure.others()
        return found

    # While it lasts

    async def _ask(self, at_s: float, ask: Ask) -> Outcome:
        await asyncio.sleep(at_s)
        return await send(ask, watch.front_of(self.fleet, "gateway-single" if ask.single else "gateway"))

    async def _do(self, fault: Fault, found: Verdict) -> NetFault | None:
        """Do one fault. A fault of the network is armed, and happens once bytes pass."""
        await asyncio.sleep(fault.at_s)
        group = fault.group
        if group in ("network", "pages") and fault.kind != "refuse":
            down = bool(fault.number & 1)
            passes = fault.number // 2 % (FRAMES_BEFORE if fault.kind in FRAMES else BYTES_BEFORE)
            net = NetFault(fault.kind, down, passes, fault.seconds, fault.number)
            self.fleet.links[fault.place].arm(net)
            return net
        if group == "clients":
            found.fired[group, fault.kind] += 1
            return None
        if await self._done(fault, found):
            found.fired[group, fault.kind] += 1
        return None

    async def _done(self, fault: Fault, found: Verdict) -> bool:
        try:
            if fault.kind == "refuse":
                link = self.fleet.links[fault.place]
                link.refusing = True
                link.break_all()
                await asyncio.sleep(fault.seconds)
                link.refusing = False
                return True
            happening: Awaitable[bool] = (
                peers.happen(fault, self.fleet)
                if fault.group in ("peers", "certificates")
                else machine.happen(fault, self.fleet)
            )
            return await happening
        except Exception as error:
            found.wrong.append(f"{fault.kind} at {fault.place}: {type(error).__name__}: {error}")
            return True

    # Afterwards

    async def _heal(self, found: Verdict) -> None:
        """Undo what does not end by itself: links, stopped processes, clocks, files; start again what has ended."""
        fleet = self.fleet
        for link in fleet.links.values():
            link.heal()
        if any(fault.group == "processes" for fault in found.round.faults):
            for name, service in fleet.services.items():
                if any(fault.kind == "clock" for fault in found.round.faults) and "twin" not in name:
                    fleet.clock.jump(name, 0)
                with suppress(ProcessLookupError):
                    os.kill(service.process.pid, signal.SIGCONT)
            await self._until_ended(found)
            for name in fleet.models:
                fleet.repair(name)
        elif dead := fleet.dead():
            found.wrong.append(f"ended, though no fault of this round ends a process: {', '.join(dead)}")
        for attempt in range(STARTS):
            dead = fleet.dead()
            for name in dead:
                self._check_last_words(name, found)
            await asyncio.gather(*(fleet.respawn(name) for name in dead))
            try:
                await asyncio.gather(*(fleet.listens(name) for name in (*STAGES, *dead)))
                await fleet.until_ready(READY_S)
                return
            except BagelError as error:
                found.wrong.append(Late(f"not ready again: {error}"))
                if attempt == STARTS - 1:
                    raise

    async def _until_ended(self, found: Verdict) -> None:
        """Wait for services that were told to end, or cannot go on. What starts without room on a disk may serve."""
        for fault in found.round.faults:
            if fault.kind not in ENDING:
                continue
            process, began = self.fleet.services[fault.place].process, time.monotonic()
            while process.poll() is None and time.monotonic() < began + ENDS_S:
                if fault.kind == "disk" and await self._serves(fault.place):
                    process.kill()  # it still has the limit
                loaded_again = fault.kind == "checkpoint" and time.monotonic() > began + NOTICED_S
                if loaded_again and await self._serves(fault.place):
                    found.wrong.append(f"{fault.place} serves another checkpoint than the one that it announced")
                    process.kill()
                await asyncio.sleep(0.05)
            if process.poll() is None:
                found.wrong.append(Late(f"{fault.kind}: {fault.place} has not ended within {ENDS_S:g} s"))
            elif fault.kind == "drain" and process.returncode != 0 and not self._ended_otherwise(found.round, fault):
                found.wrong.append(f"{fault.place} was told to stop and ended with exit code {process.returncode}")

    @staticmethod
    def _ended_otherwise(round_: Round, drain: Fault) -> bool:
        """Whether another fault of the round may have ended the service, or its successor, while it shut down."""
        others = (*ENDING, "kill-service", "memory")
        return any(each.kind in others and each.place == drain.place and each is not drain for each in round_.faults)

    async def _serves(self, name: str) -> bool:
        """Whether a stage is ready."""
        service = self.fleet.services[name]
        if not service._listening.done():
            return False
        security = self.fleet.security(name)
        async with channel(service._listening.result(), security, watch.fleet_role(name)) as connection:
            with suppress(grpc.RpcError):
                answer = await HealthStub(connection).Check(HealthCheckRequest(), timeout=1)
                return bool(answer.status == HealthCheckResponse.SERVING)
        return False

    def _check_last_words(self, name: str, found: Verdict) -> None:
        """A service that ends by itself says why in one line, without a traceback."""
        service = self.fleet.services[name]
        if service.process.returncode in (0, -signal.SIGKILL) or any(f.kind == "memory" for f in found.round.faults):
            return
        try:
            service.check()
        except BagelError as error:
            if "ended with exit code" in str(error) or "was killed" in str(error):
                found.wrong.append(f"{name} ended without a clear line: {error}")

    async def _judge(self, outcomes: list[Outcome], happened: Round, found: Verdict) -> None:
        for outcome in outcomes:
            twin = await self._twin(outcome.ask) if outcome.answer is not None else None
            found.ends[self._end(outcome, twin)] += 1
            self._add(found, verdict(outcome, twin, happened), shown(outcome.ask))

    def _add(self, found: Verdict, wrong: str, of: str) -> None:
        if wrong:
            found.wrong.append(type(wrong)(f"{of}: {wrong}"))

    def _end(self, outcome: Outcome, twin: Outcome | None) -> str:
        if outcome.answer is not None:
            equal = twin is not None and outcome.answer == twin.answer
            return "answered, equal byte for byte" if equal else "answered otherwise"
        return "left" if outcome.left else f"{outcome.error} {outcome.status}"

    async def _twin(self, ask: Ask) -> Outcome:
        """What undisturbed services answer, computed once."""
        key = ask.twin
        if key not in self._twins:
            async with self._at_twin:
                outcome = await send(key, watch.front_of(self.fleet, TWIN_FRONT, direct=True))
            self._twins[key] = outcome
        return self._twins[key]

    async def _at_rest(self, found: Verdict) -> None:
        """Nothing is held, nothing computes, everything works, and no process has grown."""
        for outcome in await asyncio.gather(*(self._ask(0.0, probe) for probe in PROBES)):
            probed = replace(found.round, flavour="clients", faults=())
            self._add(
                found, verdict(outcome, await self._twin(outcome.ask), probed), f"afterwards, {shown(outcome.ask)}"
            )
        deadline = time.monotonic() + REST_S
        while (left := await self._unrest()) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        found.wrong += [Late(f"not at rest: {each}") for each in left]
        if left:
            self._first.clear()

    async def _unrest(self) -> list[str]:
        fleet = self.fleet
        if left := await watch.held(fleet):
            return left
        before = {name: watch.use(service.process.pid) for name, service in fleet.services.items()}
        await asyncio.sleep(QUIET_S)
        known = {os.getpid()}
        for name in (*STAGES, *FRONTS):
            now, was = watch.use(fleet.services[name].process.pid), before[name]
            if now is None or was is None:
                left.append(f"{name} has ended")
                continue
            known |= {now.pid, *now.children}
            if name in (*DITS, "single") and now.cpu - was.cpu > QUIET_TICKS:
                left.append(f"{name} computes, though nothing is asked of it")
            if now.files > 0:
                left += [f"{name} has {more}" for more in watch.grown(self._first.setdefault(now.pid, now), now)]
        return left or watch.orphans(known, fleet.folder)
