"""Real ranks for tests: processes that meet through gloo, as a mesh that each call chooses."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bagel.parallel.mesh import Mesh

LIMIT_S = 120.0
EXCHANGE_S = 60.0


@dataclass
class Ranks:
    """Processes that wait for work. They are started when they are first needed, as each loads torch."""

    folder: Path
    _processes: list[tuple[BaseProcess, Connection]] = field(default_factory=list)
    _calls: int = 0

    def run(self, mesh: Mesh, work: Callable[..., Any], *arguments: Any, **sizes: int) -> list[Any]:
        """work(groups, *arguments) on every rank of a mesh, at once; what each returns, by rank.

        work: a function of a module; sizes: as `join` takes them. Raises AssertionError with the first rank's error, or
        for ranks that hang.
        """
        try:
            return self._run(mesh, work, arguments, sizes)
        except AssertionError:
            self.end()  # ranks that wait for one that failed are of no more use
            raise

    def end(self) -> None:
        """Kill the processes; the next call starts new ones."""
        for process, _ in self._processes:
            process.kill()
        self._processes.clear()

    def _run(
        self, mesh: Mesh, work: Callable[..., Any], arguments: tuple[Any, ...], sizes: dict[str, int]
    ) -> list[Any]:
        self._calls += 1
        meeting = (self.folder / f"meeting-{self._calls}").as_uri()
        self._start(mesh.size)
        ranks = self._processes[: mesh.size]
        for index, (_, connection) in enumerate(ranks):
            connection.send((mesh, index, meeting, sizes, work, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(ranks):
            left = {connection: index for index, (_, connection) in enumerate(ranks) if index not in results}
            ready = wait(list(left), LIMIT_S)
            assert ready, f"ranks {sorted(left.values())} of {mesh} hang"
            for connection in (each for each in left if each in ready):
                try:
                    error, results[left[connection]] = connection.recv()
                except EOFError:
                    error = "its process has ended"
                assert not error, f"rank {left[connection]} of {mesh}:\n{error}"
        return [results[index] for index in range(len(ranks))]

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))


@contextmanager
def ranks_in(folder: Path) -> Iterator[Ranks]:
    ranks = Ranks(folder)
    try:
        yield ranks
    finally:
        ranks.end()


def _serve(connection: Connection) -> None:
    """What a process does: work until the tests are over."""
    # Where the machine's own name has no address, gloo finds none by itself.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    from bagel.parallel.groups import join, leave

    torch.set_num_threads(1)
    while True:
        try:
            mesh, index, meeting, sizes, work, arguments = connection.recv()
        except EOFError:
            return
        try:
            groups = join(mesh.rank(index), torch.device("cpu"), meeting, timeout_s=EXCHANGE_S, **sizes)
            try:
                connection.send(("", work(groups, *arguments)))
            finally:
                leave()
        except Exception:
            connection.send((traceback.format_exc(), None))
