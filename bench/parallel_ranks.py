"""A part of `python -m bench parallel` in processes of its own, a rank each, within a time limit.

A rank that fails, ends or hangs in an exchange is told as such, and all are killed, so that the next part still runs.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from bagel.parallel.groups import join, leave
from bagel.parallel.mesh import Mesh
from bagel.parallel.rendezvous import Rendezvous
from bench.parallel_lab import RankLab
from bench.report import Table

EXCHANGE_S = 60.0
"""Of an exchange that another rank does not come to."""
CPU_LIMIT_S = 400.0
"""Of each part on a CPU, and of its exchanges: other processes may use it too."""

Said = Table | str | None
"""What a rank says: a table, why it cannot go on, or that it is done."""
RankProcess = tuple[BaseProcess, Connection]


@dataclass(frozen=True)
class Part:
    """Work that the ranks of a mesh do at once; its tables are those of the first rank.

    limit_s: on GPUs, from the start of the processes on. vae_ranks, weight_ranks: as `join` takes them.
    """

    name: str
    mesh: Mesh
    work: Callable[[RankLab], Iterator[Table]]
    limit_s: float
    vae_ranks: int = 1
    weight_ranks: int = 1


class RankFailed(Exception):
    """A rank cannot do its work, or does not end."""


def failed(name: str, error: Exception) -> Table:
    """What stands for a part that did not come to its end."""
    return Table(f"parallel {name} FAILED", (str(error) or repr(error)).splitlines()[0], failed=True)


def run(part: Part, device: str) -> Iterator[Table]:
    """Do a part on devices of this type; yields its tables, and one that failed if it does not come to its end."""
    meeting = Rendezvous()
    ranks = [_start(part, index, device, meeting.address) for index in range(part.mesh.size)]
    try:
        yield from _tables(ranks, part.limit_s if device == "cuda" else CPU_LIMIT_S)
    except RankFailed as error:
        yield failed(part.name, error)
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()
        meeting.close()


def _tables(ranks: Sequence[RankProcess], limit_s: float) -> Iterator[Table]:
    """Tables as they come; raises RankFailed for the first rank that fails, or for those that are late."""
    deadline = time.monotonic() + limit_s
    running = {connection: index for index, (_, connection) in enumerate(ranks)}
    while running:
        ready = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"after {limit_s:g} s not done: rank {', '.join(map(str, sorted(running.values())))}")
        for connection, index in [(each, index) for each, index in running.items() if each in ready]:
            match _said(ranks[index]):
                case Table() as table:
                    yield table
                case None:
                    del running[connection]
                case reason:
                    raise RankFailed(_cause(ranks) or f"rank {index}: {reason}")


def _cause(ranks: Sequence[RankProcess]) -> str | None:
    """The first rank that has ended by itself: exchanges of the others fail because of it."""
    codes = [process.exitcode for process, _ in ranks]
    return next((f"rank {index} ended with exit code {code}" for index, code in enumerate(codes) if code), None)


def _said(rank: RankProcess) -> Said:
    process, connection = rank
    try:
        said: Said = connection.recv()
    except EOFError:
        process.join()
        return "it ended before its work was done"
    return said


def _start(part: Part, index: int, device: str, address: str) -> RankProcess:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_rank, args=(part, index, device, address, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a process that ends is seen at once
    return process, ours


def _rank(part: Part, index: int, device: str, address: str, connection: Connection) -> None:
    """What a process does."""
    try:
        _work(part, index, device, address, connection)
        leave()
        connection.send(None)
    except Exception as error:
        traceback.print_exc()
        connection.send(repr(error))
        # Until it is killed: if it ended now, the others' exchanges would fail too, and hide the cause.
        connection.poll(None)


def _work(part: Part, index: int, device: str, address: str, connection: Connection) -> None:
    """In a function of its own, as nothing may hold CUDA graphs when the groups are left."""
    place = torch.device(device, index) if device == "cuda" else torch.device(device)
    if device == "cpu":
        torch.set_num_threads(1)
    groups = join(
        part.mesh.rank(index),
        place,
        address,
        timeout_s=EXCHANGE_S if device == "cuda" else CPU_LIMIT_S,
        vae_ranks=part.vae_ranks,
        weight_ranks=part.weight_ranks,
    )
    with torch.inference_mode():
        for table in part.work(RankLab(part.name, groups, place)):
            if index == 0:
                connection.send(table)
