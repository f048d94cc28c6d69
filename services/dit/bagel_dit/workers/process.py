"""Ranks as child processes of the server, on its host."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

from bagel.engine.commands import Command
from bagel.engine.progress import Heartbeat
from bagel.telemetry.logs import Log
from bagel_dit.workers import RankSettings
from bagel_dit.workers.messages import SILENCE_S, Alive, Hung, Order, Ready, Report, Stop
from bagel_dit.workers.pipe import Pipe
from bagel_dit.workers.watch import Watch

STOP_S = 10.0

log = Log("bagel.dit")


def _main(connection: Connection, settings: RankSettings) -> None:
    """What the child runs; torch is imported there alone."""
    pipe, heartbeat = Pipe(connection), Heartbeat()
    watch = Watch(heartbeat, settings.config.step_timeout_s, pipe.send)
    watch.start()  # the import may hang too
    from bagel_dit.workers.rank import main

    main(pipe, heartbeat, watch, settings)


class ProcessGroup:
    """A WorkerGroup of one child process a rank; the first one's events are passed on."""

    def __init__(
        self,
        settings: RankSettings,
        world: int,
        *,
        emit: Callable[[Report], None],
        on_death: Callable[[str], None],
    ) -> None:
        self._on_death: Callable[[str], None] | None = on_death
        self._ranks = [
            _Process(settings, emit if rank == 0 else lambda report: None, self._died) for rank in range(world)
        ]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.pid for rank in self._ranks)

    def send(self, command: Command) -> None:
        """As WorkerGroup has it."""
        for rank in self._ranks:
            rank.send(command)

    async def stop(self) -> None:
        """As WorkerGroup has it."""
        self._on_death = None
        await asyncio.gather(*(rank.stop() for rank in self._ranks))

    def _died(self, cause: str) -> None:
        """A rank has ended; without it the others would wait for it for ever."""
        # Once: the deaths of the ranks that are killed here are not reported.
        on_death, self._on_death = self._on_death, None
        for rank in self._ranks:
            rank.kill()
        if on_death is not None:
            on_death(cause)


class _Process:
    """One rank. emit and on_death (cause) are called in the event loop."""

    def __init__(self, settings: RankSettings, emit: Callable[[Report], None], on_death: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_timeout_s = settings.config.step_timeout_s
        self._emit, self._on_death = emit, on_death
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._ready = False
        context = multiprocessing.get_context("spawn")  # gRPC and CUDA survive no fork
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_main, args=(theirs, settings), name="dit-runner", daemon=True
        )
        self._process.start()
        # Only the child holds this end now, so its death is an end of file here.
        theirs.close()
        # Threads, as reading and writing a pipe block, which the event loop must not.
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, order: Order) -> None:
        """Queue an order; it is lost if the process has ended."""
        self._orders.put(order)

    async def stop(self) -> None:
        """End the process, by force if it does not end by itself."""
        if self._ready:  # while it loads it reads no orders, and has nothing to finish
            self.send(Stop())
            await asyncio.to_thread(self._process.join, STOP_S)
        self.kill()
        await asyncio.to_thread(self._process.join)
        self._orders.put(None)

    def kill(self) -> None:
        """End the process at once; nothing if it has ended."""
        if self._process.is_alive():
            self._process.kill()

    def _send_all(self) -> None:
        while (order := self._orders.get()) is not None:
            with suppress(OSError, ValueError):
                self._connection.send(order)

    def _receive_all(self) -> None:
        hung = self._pass_on()
        if hung:
            self._process.kill()
        self._process.join(STOP_S)  # one that its device's driver holds may not even end then
        self._orders.put(None)
        self._call(self._on_death, hung or _cause(self._process.exitcode))

    def _pass_on(self) -> str:
        """Pass on reports until the process ends or must be killed; why it must be, else an empty text."""
        limit = self._step_timeout_s  # while it loads: the import of a large library may keep it silent
        while True:
            try:
                if not self._comes_within(limit):
                    log.error("the runner is silent and is killed", seconds=limit)
                    return f"silent for {limit:g} s, killed"
                report: Report = self._connection.recv()
            except (EOFError, OSError):
                return ""
            except Exception as error:  # a report that cannot be read: the next ones make no sense without it
                log.error("the runner's report cannot be read; it is killed", exc_info=True)
                return f"sent a report that cannot be read ({type(error).__name__}), killed"
            match report:
                case Alive():
                    continue
                case Hung():
                    doing = "while it loaded the model" if report.loading else "in one step"
                    log.error("the runner hangs and is killed", step_timeout=self._step_timeout_s, stack=report.stack)
                    return f"hung for {self._step_timeout_s:g} s {doing}, killed"
                case Ready():
                    self._ready = True
                    # Its model is loaded, so its watch's thread is never silent for long.
                    limit = min(SILENCE_S, self._step_timeout_s)
            self._call(self._emit, report)

    def _comes_within(self, limit_s: float) -> bool:
        """Whether something comes within so many seconds; only time in which this process runs counts."""
        # Slices, so that a pause of this process counts as one of them at most.
        slice_s, waited = min(1.0, limit_s / 4), 0.0
        while waited < limit_s:
            if self._connection.poll(slice_s):
                return True
            waited += slice_s
        return False

    def _call(self, callback: Callable[[Any], None], value: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, value)


def _cause(code: int | None) -> str:
    """Why a process ended, by its exit code."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
