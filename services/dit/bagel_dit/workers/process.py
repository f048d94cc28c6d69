"""Ranks as child processes of the server, on its host."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bagel.engine.commands import Command
from bagel.engine.events import Broken
from bagel.engine.progress import Heartbeat
from bagel.parallel.left_behind import remove_left_behind
from bagel.parallel.rendezvous import Rendezvous
from bagel.telemetry.logs import Log
from bagel_dit.workers import KvNode, Place, RankSettings
from bagel_dit.workers.agreement import Agreement, Disagreement
from bagel_dit.workers.messages import (
    GROUP_SILENCE_S,
    SILENCE_S,
    STOPPED_S,
    Alive,
    Hung,
    Order,
    Ready,
    Report,
    Stop,
)
from bagel_dit.workers.pipe import Pipe
from bagel_dit.workers.verdict import GRACE_S, End, Weight, verdict
from bagel_dit.workers.watch import Watch

STOP_S = 10.0

log = Log("bagel.dit")


def _main(connection: Connection, settings: RankSettings, place: Place) -> None:
    """What the child runs; torch is imported there alone."""
    pipe, heartbeat = Pipe(connection), Heartbeat()
    watch = Watch(heartbeat, settings.config.step_timeout_s, pipe.send, place.rendezvous)
    watch.start()  # the import may hang too
    from bagel_dit.workers.rank import main

    main(pipe, heartbeat, watch, settings, place)


class ProcessGroup:
    """A WorkerGroup of one child process a rank."""

    here = True
    nodes: tuple[KvNode, ...] = ()

    def __init__(
        self, settings: RankSettings, *, emit: Callable[[Report], None], on_death: Callable[[str], None]
    ) -> None:
        world = settings.config.parallel.world_size
        self._emit, self._agreement, self._ends = emit, Agreement(world), list[End]()
        self._on_death: Callable[[str], None] | None = on_death
        self._rendezvous = Rendezvous() if world > 1 else None
        meet = "" if self._rendezvous is None else self._rendezvous.address
        self._ranks = list[_Process]()
        try:
            for rank in range(world):
                heard = partial(self._heard, rank)
                self._ranks.append(_Process(settings, Place(rank, meet), world, heard, self._ended))
        except BaseException:  # as where the machine has no memory for another process
            self._on_death = None
            for started in self._ranks:
                started.kill()
            self._close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.pid for rank in self._ranks)

    def send(self, command: Command) -> None:
        """As WorkerGroup has it."""
        self._agreement.sent(command)
        for rank in self._ranks:
            rank.send(command)

    async def stop(self) -> None:
        """As WorkerGroup has it."""
        self._on_death = None
        await asyncio.gather(*(rank.stop() for rank in self._ranks))
        self._close()

    def _heard(self, rank: int, report: Report) -> None:
        if self._on_death is None or self._ends:
            return  # it is over: what ranks say now leads to nothing
        try:
            agreed = self._agreement.add(rank, report)
        except Disagreement as error:
            self._ended(End(rank, f"{error}, killed", Weight.KILLED_HERE))
            return
        if agreed is not None:
            self._emit(agreed)

    def _ended(self, end: End) -> None:
        """A rank has ended or must; without it the others would wait for it for ever."""
        if self._on_death is None:
            return
        self._ends.append(end)
        if len(self._ends) > 1:
            return
        if len(self._ranks) == 1:
            self._end()
        else:
            # Others lose it too and may say so first: a moment shows which one was the first to go.
            asyncio.get_running_loop().call_later(GRACE_S, self._end)

    def _end(self) -> None:
        """Take the whole group down, and report the death once all of its processes are gone."""
        end = verdict(self._ends)  # before the others are killed, whose ends explain nothing
        for rank in self._ranks:
            rank.kill()
        self._ending = asyncio.ensure_future(self._report(end))

    async def _report(self, end: End) -> None:
        # Their devices' memory is free again then, for the group that follows.
        await asyncio.gather(*(rank.gone() for rank in self._ranks))
        self._close()
        # Once, and not if the group was stopped meanwhile.
        on_death, self._on_death = self._on_death, None
        if on_death is not None:
            on_death(end.cause if len(self._ranks) == 1 else f"rank {end.rank}: {end.cause}")

    def _close(self) -> None:
        for rank in self._ranks:
            remove_left_behind(rank.pid)
        if self._rendezvous is not None:
            self._rendezvous.close()


class _Process:
    """One rank. emit and on_end are called in the event loop."""

    def __init__(
        self,
        settings: RankSettings,
        place: Place,
        world: int,
        emit: Callable[[Report], None],
        on_end: Callable[[End], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_timeout_s = settings.config.step_timeout_s
        self._index, self._grouped = place.index, world > 1
        self._emit, self._on_end = emit, on_end
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._ready = False
        context = multiprocessing.get_context("spawn")  # gRPC and CUDA survive no fork
        self._connection, theirs = context.Pipe()
        name = f"dit-runner-{place.index}" if self._grouped else "dit-runner"
        self._process: BaseProcess = context.Process(
            target=_main, args=(theirs, settings, place), name=name, daemon=True
        )
        self._process.start()
        # Only the child holds this end now, so its death is an end of file here.
        theirs.close()
        try:
            # Threads, as reading and writing a pipe block, which the event loop must not.
            for work in (self._send_all, self._receive_all):
                threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()
        except BaseException:
            self.kill()
            raise

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

    async def gone(self) -> None:
        """Wait until a process that was killed has ended."""
        # One that its device's driver holds may not even end then.
        await asyncio.to_thread(self._process.join, STOP_S)

    def _send_all(self) -> None:
        while (order := self._orders.get()) is not None:
            with suppress(OSError, ValueError):
                self._connection.send(order)

    def _receive_all(self) -> None:
        end = self._pass_on()
        if end is not None and not self._grouped:
            self._process.kill()
        if end is None or not self._grouped:
            self._process.join(STOP_S)  # one that its device's driver holds may not even end then
        self._orders.put(None)
        self._call(self._on_end, end or End(self._index, _cause(self._process.exitcode), Weight.ENDED))

    def _pass_on(self) -> End | None:
        """Pass on reports until the process ends or must be killed; why it must be, else None."""
        limit = self._step_timeout_s  # while it loads: the import of a large library may keep it silent
        while True:
            try:
                if silent := self._silence(limit):
                    log.error("the runner is silent and is killed", why=silent, seconds=limit, rank=self._index)
                    return self._must_end(f"{silent}, killed")
                report: Report = self._connection.recv()
            except (EOFError, OSError):
                return None
            except Exception as error:  # a report that cannot be read: the next ones make no sense without it
                log.error("the runner's report cannot be read; it is killed", exc_info=True, rank=self._index)
                return self._must_end(f"sent a report that cannot be read ({type(error).__name__}), killed")
            match report:
                case Alive():
                    continue
                case Broken():
                    return End(self._index, report.cause, Weight.TOLD)
                case Hung():
                    doing = "while it loaded the model" if report.loading else "in one step"
                    timeout = self._step_timeout_s
                    log.error(
                        "the runner hangs and is killed", step_timeout=timeout, stack=report.stack, rank=self._index
                    )
                    return self._must_end(f"hung for {timeout:g} s {doing}, killed")
                case Ready():
                    self._ready = True
                    # Its model is loaded, so its watch's thread is never silent for long.
                    limit = min(GROUP_SILENCE_S if self._grouped else SILENCE_S, self._step_timeout_s)
            self._call(self._emit, report)

    def _must_end(self, cause: str) -> End:
        return End(self._index, cause, Weight.KILLED_HERE)

    def _silence(self, limit_s: float) -> str:
        """Wait for a report; what the process does instead if none comes within so many seconds, else an empty text.

        Only time in which this process runs counts.
        """
        # Slices, so that a pause of this process counts as one of them at most.
        slice_s, waited, stopped = min(1.0, limit_s / 4), 0.0, 0.0
        while waited < limit_s:
            if self._connection.poll(slice_s):
                return ""
            waited += slice_s
            # All other ranks wait for it, so it is not given the time that a single one has.
            stopped = stopped + slice_s if self._grouped and is_stopped(self.pid) else 0.0
            if stopped >= STOPPED_S:
                return f"stopped by a signal for {stopped:g} s"
        return f"silent for {limit_s:g} s"

    def _call(self, callback: Callable[[Any], None], value: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, value)


def is_stopped(pid: int) -> bool:
    """Whether a process of this host is stopped by a signal; False where the system does not say."""
    try:
        # After the name, which may have spaces and brackets itself.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state == "T"


def _cause(code: int | None) -> str:
    """Why a process ended, by its exit code."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
