"""The same work on every rank of a mesh, in child processes of this one: for commands that run an engine themselves.

A service has workers of its own, whose ranks take commands and start again (bagel_dit.workers).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from bagel.errors import BagelError, RunnerDied
from bagel.model.device import choose_device
from bagel.model.threads import share_threads
from bagel.parallel.config import ParallelConfig
from bagel.parallel.groups import join, leave
from bagel.parallel.rendezvous import Rendezvous

EXCHANGE_S = 600.0
"""Of an exchange that another rank does not come to; a rank that ends is seen at once."""
STOP_S = 10.0
_END = ("end", None)


def on_ranks(
    parallel: ParallelConfig, device: str, work: Callable[..., Iterator[Any]], *arguments: Any
) -> Iterator[Any]:
    """What work(groups, *arguments) gives on the first rank, while all others run it too.

    work: a function of a module; what it gives, and the arguments, are picklable. device: as `choose_device` takes it.
    Raises the BagelError of a rank, or RunnerDied, naming the rank, for one that ends early or fails otherwise.
    """
    meeting, context = Rendezvous(), multiprocessing.get_context("spawn")
    ranks: list[tuple[BaseProcess, Connection]] = []
    try:
        for index in range(parallel.world_size):
            ours, theirs = context.Pipe(duplex=False)
            task = (theirs, parallel, index, meeting.address, device, work, arguments)
            process: BaseProcess = context.Process(target=_main, args=task, name=f"rank-{index}", daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        yield from _answers([connection for _, connection in ranks])
        for rank, _ in ranks:
            rank.join(STOP_S)
    finally:
        for rank, _ in ranks:
            rank.kill()
            rank.join()
        meeting.close()


def _answers(connections: list[Connection]) -> Iterator[Any]:
    """What the first rank says, until all have ended well."""
    running = dict(zip(connections, range(len(connections)), strict=True))
    while running:
        for connection in wait(list(running)):
            assert isinstance(connection, Connection)
            rank = running[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                raise RunnerDied(f"rank {rank} ended early") from None
            if kind == "error":
                if isinstance(value, BagelError):
                    raise value
                # An exchange fails because the rank that it was with has ended, which is the cause.
                ready = wait(set(running) - {connection}, 0)
                ended = next((other for each, other in running.items() if each in ready and _at_end(each)), None)
                raise RunnerDied(f"rank {rank} failed: {value}" if ended is None else f"rank {ended} ended early")
            if (kind, value) == _END:
                del running[connection]
            else:
                yield value


def _at_end(connection: Connection) -> bool:
    """Whether a rank that has something to say, or has ended, has ended."""
    try:
        connection.recv()
    except (EOFError, OSError):
        return True
    return False


def _main(
    connection: Connection,
    parallel: ParallelConfig,
    index: int,
    meeting: str,
    device: str,
    work: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    """One rank."""
    try:
        _work(connection, parallel, index, meeting, device, work, arguments)
    except Exception as error:
        with suppress(OSError):
            connection.send(("error", error if isinstance(error, BagelError) else f"{type(error).__name__}: {error}"))
        os._exit(1)  # without waiting for other ranks, which may never come


def _work(
    connection: Connection,
    parallel: ParallelConfig,
    index: int,
    meeting: str,
    device: str,
    work: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    place = choose_device(device, index)
    share_threads(parallel.world_size)
    groups = join(
        parallel.rank(index),
        place,
        meeting,
        timeout_s=EXCHANGE_S,
        vae_ranks=parallel.vae_patch_parallel_size,
        weight_ranks=parallel.shards,
    )
    for answer in work(groups, str(place), *arguments):
        if index == 0:
            connection.send(("answer", answer))
    leave()
    connection.send(_END)
