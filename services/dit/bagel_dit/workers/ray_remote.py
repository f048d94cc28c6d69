"""The server's end of a rank in a Ray actor: orders and reports by calls, and when the rank must end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

import bagel
from bagel.engine.events import Broken
from bagel.errors import BagelError, ConfigError
from bagel.telemetry.logs import Log
from bagel_dit.workers import Place, RankSettings
from bagel_dit.workers.messages import GROUP_SILENCE_S, SILENCE_S, STOPPED_S, Alive, Hung, Order, Ready, Report, Stop
from bagel_dit.workers.process import is_stopped
from bagel_dit.workers.ray_cluster import Node
from bagel_dit.workers.ray_rank import About, Ended, Said
from bagel_dit.workers.verdict import End, Weight

STOP_S = 10.0
START_S = 120.0
"""Seconds in which an actor answers first: its node imports this package."""

log = Log("bagel.dit")


class RemoteRank:
    """The server's end of one actor. heard and ended are called in the event loop."""

    def __init__(
        self,
        index: int,
        node: Node,
        actor: Any,
        step_timeout_s: float,
        grouped: bool,
        here: bool,
        heard: Callable[[int, Report], None],
        ended: Callable[[End], None],
    ) -> None:
        self.index, self.node, self.actor, self.here = index, node, actor, here
        self._step_timeout_s, self._grouped, self._heard, self._ended = step_timeout_s, grouped, heard, ended
        self._orders: list[Order] = []
        self._ordered = asyncio.Event()
        self._ready, self._over = False, asyncio.Event()
        self.pid = 0

    async def meet(self) -> None:
        """Wait until the actor runs. Raises ConfigError for a node that has another release of this package."""
        try:
            async with asyncio.timeout(START_S):
                about: About = await answer(self.actor.about.remote())
        except RayActorError as error:
            raise ConfigError(
                f"no rank can be started on node {self.node.address}: {one_line(error)}; install this release there, "
                "with the extra ray, for the Python that Ray runs with"
            ) from error
        if about.release != bagel.__version__:
            raise ConfigError(
                f"node {self.node.address} has release {about.release} of this package, and this service has "
                f"{bagel.__version__}; install the same on all nodes"
            )
        self.pid = about.pid

    async def free_port(self) -> int:
        """A free port of its node."""
        return int(await answer(self.actor.free_port.remote(self.node.address)))

    async def start(self, settings: RankSettings, place: Place) -> None:
        """Let the rank load its model."""
        await answer(self.actor.start.remote(settings, place, self.node.address))

    def send(self, order: Order) -> None:
        """Queue an order; it is lost if the actor has ended."""
        self._orders.append(order)
        self._ordered.set()

    async def stop(self) -> None:
        """Ask the rank to end, and wait for it a while."""
        if self._ready:  # while it loads it takes no orders, and has nothing to finish
            self.send(Stop())
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._over.wait()

    async def send_all(self) -> None:
        """Give the actor its orders, those that have come together in one call, one call after the other."""
        with suppress(RayError):  # `receive` finds that the actor is gone
            while True:
                await self._ordered.wait()
                self._ordered.clear()
                orders, self._orders = self._orders, []
                await answer(self.actor.order.remote(orders))

    async def receive(self) -> None:
        """Pass on what the rank tells until it ends, or must."""
        try:
            end = await self._pass_on()
        except RayError as error:
            log.error("an actor has ended", rank=self.index, node=self.node.address, error=str(error))
            low = "running low on memory" in str(error)
            cause = "its node has too little memory, and Ray killed it" if low else "its process ended"
            end = End(self.index, cause, Weight.ENDED)
        except Exception as error:  # a report that cannot be read: the next ones make no sense without it
            log.error("a rank's report cannot be read", rank=self.index, exc_info=True)
            end = self._must_end(f"sent a report that cannot be read ({type(error).__name__}), killed")
        self._over.set()
        self._ended(end)

    async def _pass_on(self) -> End:
        limit = self._step_timeout_s  # while it loads: the import of a large library may keep it silent
        while True:
            asked = asyncio.ensure_future(answer(self.actor.reports.remote()))
            try:
                silent = await self._silence(asked, limit)
            finally:
                asked.cancel()  # nothing where it has come
            if silent:
                log.error("a rank is silent and is killed", why=silent, rank=self.index, node=self.node.address)
                return self._must_end(f"{silent}, killed")
            for report in asked.result():
                match report:
                    case Alive():
                        continue
                    case Said():
                        sys.stderr.write(report.lines)
                    case Ended():
                        return End(self.index, report.cause or "it ended", Weight.TOLD)
                    case Broken():
                        return End(self.index, report.cause, Weight.TOLD)
                    case Hung():
                        doing = "while it loaded the model" if report.loading else "in one step"
                        log.error("a rank hangs and is killed", rank=self.index, stack=report.stack)
                        return self._must_end(f"hung for {self._step_timeout_s:g} s {doing}, killed")
                    case _:
                        if isinstance(report, Ready):
                            self._ready = True
                            # Its model is loaded, so its watch's thread is never silent for long.
                            limit = min(GROUP_SILENCE_S if self._grouped else SILENCE_S, self._step_timeout_s)
                        self._heard(self.index, report)

    async def _silence(self, asked: asyncio.Future[Any], limit_s: float) -> str:
        """Wait for an answer; what the rank does instead if none comes within so many seconds, else an empty text.

        Only time in which this process runs counts.
        """
        # Slices, so that a pause of this process counts as one of them at most.
        slice_s, waited, stopped = min(1.0, limit_s / 4), 0.0, 0.0
        while waited < limit_s:
            done, _ = await asyncio.wait({asked}, timeout=slice_s)
            if done:
                return ""
            waited += slice_s
            # All other ranks wait for it, so it is not given the time that a single one has.
            watched = self._grouped and self.here and self._ready
            stopped = stopped + slice_s if watched and is_stopped(self.pid) else 0.0
            if stopped >= STOPPED_S:
                return f"stopped by a signal for {stopped:g} s"
        return f"silent for {limit_s:g} s"

    def _must_end(self, cause: str) -> End:
        return End(self.index, cause, Weight.KILLED_HERE)


async def answer(call: Awaitable[Any]) -> Any:
    """What a call of an actor returns; raises its BagelError as it was raised there, else RayError."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, BagelError):
            raise error.cause from None
        raise


def one_line(error: BaseException) -> str:
    """What Ray says, in a line: the last one, as its texts end with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300].partition(". Some common causes")[0]
