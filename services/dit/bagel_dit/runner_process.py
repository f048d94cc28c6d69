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
from queue import SimpleQueue
from typing import Any

from bagel.kv.arena import Arena
from bagel.telemetry import Log
from bagel_dit.messages import SILENCE_S, Command, Reply, RunnerSettings, Stop

STOP_S = 10.0

log = Log("bagel.dit")


def _main(connection: Connection, arena_fd: Any, arena_bytes: int, settings: RunnerSettings) -> None:
    """What the child runs; torch is imported there alone."""
    from bagel_dit.runner import main

    main(connection, arena_fd, arena_bytes, settings)


class RunnerProcess:
    """One runner. on_reply and on_death (its exit code) are called in the event loop."""

    def __init__(
        self,
        settings: RunnerSettings,
        arena: Arena | None,
        on_reply: Callable[[Reply], None],
        on_death: Callable[[int | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_reply, self._on_death = on_reply, on_death
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        context = multiprocessing.get_context("spawn")  # gRPC and CUDA survive no fork
        self._connection, theirs = context.Pipe()
        nbytes = 0 if arena is None else arena.nbytes
        self._process: BaseProcess = context.Process(
            target=_main, args=(theirs, _Descriptor(arena), nbytes, settings), name="dit-runner", daemon=True
        )
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
        self._on_death = lambda code: None
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
        silence: float | None = None  # loading takes as long as it takes
        while True:
            try:
                if not self._connection.poll(silence):
                    log.error("the runner is silent and is killed", seconds=silence)
                    self._process.kill()
                    break
                reply: Reply = self._connection.recv()
            except (EOFError, OSError):
                break
            silence = SILENCE_S
            self._tell(self._on_reply, reply)
        self._process.join()
        self._commands.put(None)
        self._tell(lambda code: self._on_death(code), self._process.exitcode)

    def _tell(self, callback: Callable[[Any], None], value: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, value)


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
