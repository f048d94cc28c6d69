"""The server's side of its runner: a process started, spoken to, missed when it dies, and started again."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bagel.deployment.dit_config import DitConfig
from bagel.kv.arena import Arena
from bagel.telemetry.logs import Log
from bagel_dit.messages import SILENCE_S, Alive, Command, Hung, Ready, Reply, Stop
from bagel_dit.pulse import Pulses, Watch

STOP_S = 10.0

log = Log("bagel.dit")


class Pipe:
    """The runner's end of its pipe: commands for the main thread, replies from any."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()

    def next(self, timeout_s: float | None) -> Command | None:
        """The next command; None if none came for so long. EOFError or OSError once the server is gone."""
        if not self._connection.poll(timeout_s):
            return None
        command: Command = self._connection.recv()
        return command

    def send(self, reply: Reply) -> None:
        """Tell the server something."""
        with self._sending:
            self._connection.send(reply)


def _main(
    connection: Connection, arena_fd: Any, arena_bytes: int, config: DitConfig, folder: Path, fingerprint: bytes
) -> None:
    """What the child runs; torch is imported there alone."""
    pipe, pulses = Pipe(connection), Pulses()
    Watch(pulses, config.step_timeout_s, pipe.send).start()  # the import may hang too
    from bagel_dit.runner import main

    main(pipe, pulses, arena_fd, arena_bytes, config, folder, fingerprint)


class RunnerProcess:
    """One runner of a checkpoint folder. on_reply and on_death (why) are called in the event loop.

    fingerprint: of the checkpoint that the service already serves, so that the runner loads no other; empty: of none.
    """

    def __init__(
        self,
        config: DitConfig,
        folder: Path,
        fingerprint: bytes,
        arena: Arena | None,
        on_reply: Callable[[Reply], None],
        on_death: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._step_timeout_s = config.step_timeout_s
        self._on_reply, self._on_death = on_reply, on_death
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        nbytes = 0 if arena is None else arena.nbytes
        context = multiprocessing.get_context("spawn")  # gRPC and CUDA survive no fork
        self._connection, theirs = context.Pipe()
        args = (theirs, _Descriptor(arena), nbytes, config, folder, fingerprint)
        self._process: BaseProcess = context.Process(target=_main, args=args, name="dit-runner", daemon=True)
        self._process.start()
        theirs.close()
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Queue a command; it is lost if the process has died, which on_death tells."""
        self._commands.put(command)

    async def stop(self) -> None:
        """End the process, with force if it does not end by itself."""
        self._on_death = lambda why: None
        self.send(Stop())
        await asyncio.to_thread(self._process.join, STOP_S)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._commands.put(None)

    def _send_all(self) -> None:
        while (command := self._commands.get()) is not None:
            with suppress(OSError, ValueError):
                self._connection.send(command)

    def _receive_all(self) -> None:
        hung = self._pass_on()
        if hung:
            self._process.kill()
        self._process.join(STOP_S)  # one that its device's driver holds may not even end then
        self._commands.put(None)
        self._tell(lambda why: self._on_death(why), hung or _cause(self._process.exitcode))

    def _pass_on(self) -> str:
        """Pass on replies until the process has ended, or is to be killed: then why, else empty."""
        limit = self._step_timeout_s  # while it loads: the import of a large library may keep it silent
        while True:
            try:
                if not self._comes_within(limit):
                    log.error("the runner is silent and is killed", seconds=limit)
                    return f"silent for {limit:g} s, killed"
                reply: Reply = self._connection.recv()
            except (EOFError, OSError):
                return ""
            match reply:
                case Alive():
                    continue
                case Hung():
                    doing = "while it loaded the model" if reply.loading else "in one step"
                    log.error("the runner hangs and is killed", step_timeout=self._step_timeout_s, stack=reply.stack)
                    return f"hung for {self._step_timeout_s:g} s {doing}, killed"
                case Ready():
                    limit = min(SILENCE_S, self._step_timeout_s)
            self._tell(self._on_reply, reply)

    def _comes_within(self, limit_s: float) -> bool:
        """Whether something comes within so many seconds; only time in which this process runs counts."""
        slice_s, waited = min(1.0, limit_s / 4), 0.0
        while waited < limit_s:
            if self._connection.poll(slice_s):
                return True
            waited += slice_s
        return False

    def _tell(self, callback: Callable[[Any], None], value: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, value)


def _cause(code: int | None) -> str:
    """Why a process ended, by its exit code."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


class _Descriptor:
    """The arena's file. A descriptor can be handed over only while the child is being started: when this is pickled."""

    def __init__(self, arena: Arena | None) -> None:
        self._arena = arena

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        if self._arena is None:
            return (_no_descriptor, ())
        return (_same, (DupFd(self._arena.fd),))


def _same(descriptor: object) -> object:
    return descriptor


def _no_descriptor() -> None:
    return None
