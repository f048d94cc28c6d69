"""The server's side of the engine: plans go to the ranks, events come back, and ranks that ended start again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from bagel.deployment.defaults import missing_install_named
from bagel.engine.commands import Advance, Command, Remove
from bagel.engine.events import Begun, Broken, Health, LayersLanded, Planned, RequestEvent, Stepped
from bagel.engine.scheduler import TOKEN_BUDGET, Scheduler
from bagel.errors import BagelError, Loading, RunnerDied
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import count_step
from bagel.v1 import common_pb2
from bagel_dit.workers import KvNode, RankSettings, WorkerGroup
from bagel_dit.workers.messages import Alive, Hung, LoadFailed, Ready, Report
from bagel_dit.workers.process import ProcessGroup

log = Log("bagel.dit")

Events = asyncio.Queue[RequestEvent | BagelError]


class RunnerClient:
    """Owns the ranks and their scheduler.

    on_health is called when the ranks can serve, and when they cannot. failed gets a RunnerDied once ranks that ended
    could not be loaded again.
    """

    def __init__(self, settings: RankSettings, on_health: Callable[[bool], Awaitable[None]]) -> None:
        self._settings, self._on_health = settings, on_health
        self.info = common_pb2.ModelInfo()
        self.kv_tokens = 0
        """Tokens of K/V that the device has room for."""
        self._listeners: dict[int, Events] = {}
        self._scheduler = self._new_scheduler()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_served = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._ranks = self._start()

    @property
    def context_ranks(self) -> int:
        """Ranks that divide the latents of each row."""
        return self._settings.config.context_parallel_size

    @property
    def under_way(self) -> int:
        """Requests under way."""
        return len(self._listeners)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks."""
        return self._ranks.pids

    @property
    def here(self) -> bool:
        """Whether a rank reads K/V in this service's memory."""
        return self._ranks.here

    @property
    def nodes(self) -> Sequence[KvNode]:
        """The other hosts with ranks."""
        return self._ranks.nodes

    async def loaded(self) -> None:
        """Wait until the model is loaded; raises the error that loading ended with."""
        # A caller that is cancelled must not cancel the future that all wait for.
        await asyncio.shield(self._ready)

    async def stop(self) -> None:
        """End the ranks."""
        self._stopping = True
        await self._ranks.stop()

    def listen(self, id_: int, events: Events) -> None:
        """Put the events of this request into a queue, and a BagelError if the ranks end."""
        if not self._ready.done() or self._ready.exception() is not None:
            raise Loading("the runner is loading its model; try again in a moment")
        self._listeners[id_] = events

    def forget(self, id_: int) -> None:
        """The request is over, or its caller has left."""
        if self._listeners.pop(id_, None) is not None:
            self._scheduler.remove(id_)
            self._ranks.send(Remove(id_))

    def send(self, command: Command) -> None:
        """Give the engine a command."""
        self._ranks.send(command)

    def begin(self, begun: Begun) -> None:
        """Let a picture take steps."""
        self._scheduler.observe(begun)
        self._plan()

    def _plan(self) -> None:
        while (plan := self._scheduler.plan()) is not None:
            self._ranks.send(plan)

    def _new_scheduler(self) -> Scheduler:
        mesh = self._settings.config.parallel.mesh
        # Those of tensor parallel divide no tokens: each computes with all of them.
        return Scheduler(TOKEN_BUDGET * mesh.data * mesh.cfg * mesh.context)

    def _start(self) -> WorkerGroup:
        if self._settings.config.worker_backend == "ray":
            with missing_install_named("ray", "--worker-backend ray needs Ray"):
                # Imported here, as it is an extra that may be missing.
                from bagel_dit.workers.ray import RayGroup
            return RayGroup(self._settings, emit=self._on_report, on_death=self._on_death)
        return ProcessGroup(self._settings, emit=self._on_report, on_death=self._on_death)

    def _on_report(self, report: Report) -> None:
        match report:
            case Ready():
                self._on_ready(report)
            case LoadFailed():
                self._ready.set_exception(report.error)
            case Health():
                self._spawn(self._on_health(report.healthy))
            case Alive() | Hung() | Broken():
                pass  # of a process, which its group handles
            case LayersLanded():
                if report.id in self._listeners:
                    self._ranks.send(Advance(report.id))
            case Stepped():
                for done in report.timed:
                    count_step(done.kind, done.requests, done.seconds)
                self._scheduler.observe(report)
                self._plan()
            case _:
                if (events := self._listeners.get(report.id)) is not None:
                    events.put_nowait(report)
                    if isinstance(report, Planned):
                        self._scheduler.observe(report)
                        self._plan()

    def _on_ready(self, ready: Ready) -> None:
        self.info = common_pb2.ModelInfo.FromString(ready.info)
        # Ranks that are started again must load the model that was announced and whose K/V are held.
        self._settings = replace(self._settings, fingerprint=self.info.checkpoint_fingerprint)
        self.kv_tokens = ready.kv_tokens
        memory = dict(ready.memory)
        log.info("memory", weights_bytes=memory, kv_tokens=ready.kv_tokens, runner_pid=next(iter(self.pids), None))
        if len(ready.devices) > 1:
            log.info("ranks", devices=ready.devices, pids=self.pids)
        self._ready.set_result(None)
        self._has_served = True
        self._spawn(self._on_health(True))

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
        # A new one, as the old one waits for plans that died with the ranks.
        self._scheduler = self._new_scheduler()
        self._spawn(self._on_health(False))
        try:
            self._ranks = self._start()
        except Exception as error:  # as where the machine has no memory for a process
            log.error("the runner cannot be started again", exc_info=True)
            self._ready.set_exception(error)
            self._give_up(error)

    def _give_up(self, why: BaseException) -> None:
        """A first load that fails is raised by `loaded`; a later one ends the service, for its supervisor to start."""
        if self._has_served:
            self.failed.set_exception(RunnerDied(f"the runner died and could not be loaded again: {why}"))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        # The event loop itself keeps only a weak reference to a task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
