"""Drives the runner: step plans in, replies out to whom they belong, a new runner when one has died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from google.rpc import status_pb2

from bagel.deployment.dit_config import DitConfig
from bagel.errors import BagelError, Loading, RunnerDied
from bagel.kv.arena import Arena
from bagel.rpc.errors import from_status
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import count_step
from bagel.v1 import common_pb2
from bagel_dit.messages import (
    Alive,
    Begun,
    Command,
    Health,
    Hung,
    LoadFailed,
    Ready,
    Remove,
    Reply,
    Stepped,
)
from bagel_dit.runner_process import RunnerProcess
from bagel_dit.scheduler import Scheduler

PLANS_AHEAD = 2
"""Plans that the runner may have at once: it begins the next without a round trip, and a cancel takes a step."""

log = Log("bagel.dit")


class Driver:
    """Owns the scheduler and the runner process, which loads a checkpoint folder.

    on_health is told when the runner can serve, and when it cannot.
    failed gets a RunnerDied once a runner that died could not be loaded again.
    """

    def __init__(
        self, config: DitConfig, folder: Path, arena: Arena | None, on_health: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._config, self._folder, self._arena, self._on_health = config, folder, arena, on_health
        self.info = common_pb2.ModelInfo()
        self.kv_tokens = 0
        """Tokens of K/V that the device has room for."""
        self._listeners: dict[int, asyncio.Queue[Any]] = {}
        self._scheduler = Scheduler()
        self._under_way = 0
        self._before_reading = 0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_served = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._runner = self._start()

    @property
    def under_way(self) -> int:
        """Requests that the driver has listeners for."""
        return len(self._listeners)

    async def loaded(self) -> None:
        """Wait until the model is loaded; raises what it could not be loaded for."""
        await asyncio.shield(self._ready)

    async def stop(self) -> None:
        """End the runner."""
        self._stopping = True
        await self._runner.stop()

    def listen(self, id_: int, events: asyncio.Queue[Any]) -> None:
        """Events of this request go to this queue: steps taken as int, replies, errors as BagelError."""
        if not self._ready.done() or self._ready.exception() is not None:
            raise Loading("the runner is loading its model; try again in a moment")
        self._listeners[id_] = events

    def forget(self, id_: int) -> None:
        """The request is over, or nobody waits for it any more."""
        if self._listeners.pop(id_, None) is not None:
            self._scheduler.remove(id_)
            self._runner.send(Remove(id_))

    def send(self, command: Command) -> None:
        """Give the runner a command."""
        self._runner.send(command)

    def begin(self, begun: Begun) -> None:
        """Let a picture take steps."""
        self._scheduler.add(begun.id, steps=begun.steps, bucket=begun.bucket, rows=begun.rows)
        self._drive()

    def read(self) -> None:
        """There is text to read or write."""
        self._scheduler.reading = True
        self._before_reading = self._under_way
        self._drive()

    def _drive(self) -> None:
        while self._under_way < PLANS_AHEAD and (plan := self._scheduler.plan()) is not None:
            self._under_way += 1
            self._runner.send(plan)
            if not plan.pictures:
                return  # reading goes on once its reply says that there is more

    def _start(self) -> RunnerProcess:
        served = self.info.checkpoint_fingerprint  # a runner that is started again loads no other model
        return RunnerProcess(self._config, self._folder, served, self._arena, self._on_reply, self._on_death)

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Ready():
                self.info = common_pb2.ModelInfo.FromString(reply.info)
                self.kv_tokens = reply.kv_tokens
                memory = dict(reply.memory)
                log.info("memory", weights_bytes=memory, kv_tokens=reply.kv_tokens, runner_pid=self._runner.pid)
                self._ready.set_result(None)
                self._has_served = True
                self._spawn(self._on_health(True))
            case LoadFailed():
                self._ready.set_exception(from_status(status_pb2.Status.FromString(reply.status), "the runner"))
            case Health():
                self._spawn(self._on_health(reply.healthy))
            case Stepped():
                self._under_way -= 1
                for done in reply.timed:
                    count_step(done.kind, done.requests, done.seconds)
                if self._before_reading:  # a plan from before the last request: it says nothing of that one
                    self._before_reading -= 1
                else:
                    self._scheduler.reading = reply.reading
                for id_, step in reply.pictures.items():
                    self._tell(id_, step)
                self._drive()
            case Alive() | Hung():
                pass  # the process's affair
            case _:
                self._tell(reply.id, reply)

    def _tell(self, id_: int, event: object) -> None:
        if (events := self._listeners.get(id_)) is not None:
            events.put_nowait(event)

    def _on_death(self, cause: str) -> None:
        if self._stopping:
            return
        log.error("the runner died", cause=cause, requests=len(self._listeners))
        error = RunnerDied(f"the DiT's runner process ended ({cause}) under this request; send it again")
        for events in self._listeners.values():
            events.put_nowait(error)
        if not self._ready.done():
            self._ready.set_exception(BagelError(f"the DiT's runner process ended ({cause}) while it loaded the model"))
        if (why := self._ready.exception()) is not None:
            self._give_up(why)
            return
        self._ready = asyncio.get_running_loop().create_future()
        self._scheduler, self._under_way, self._before_reading = Scheduler(), 0, 0
        self._spawn(self._on_health(False))
        self._runner = self._start()

    def _give_up(self, why: BaseException) -> None:
        """A first load that fails is told by `loaded`; a later one ends the service, for its supervisor to start."""
        if self._has_served:
            self.failed.set_exception(RunnerDied(f"the runner died and could not be loaded again: {why}"))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
