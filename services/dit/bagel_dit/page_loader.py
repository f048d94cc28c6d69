"""Pages on their way from the store to a picture's slab."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

from bagel.engine.commands import LandedPage
from bagel.errors import IncompleteContext
from bagel.kv.store import KvStore
from bagel.prompts import BranchName
from bagel.v1 import kv_pb2


class PageLoader:
    """Emits every page of some contexts once: those that are in the store, then each as it becomes ready.

    Used in the event loop, where pages are written too. Pages that become ready together are emitted together. Branches
    whose contexts are equal share their rows of the slab, so pages are emitted for the first of them alone.
    """

    def __init__(
        self,
        store: KvStore,
        refs: Mapping[BranchName, kv_pb2.ContextRef],
        emit: Callable[[tuple[LandedPage, ...]], None],
    ) -> None:
        self._store, self._emit = store, emit
        self._loop = asyncio.get_running_loop()
        self._places: dict[bytes, list[tuple[BranchName, int]]] = {}
        self._lengths: dict[bytes, int] = {}
        self._seen: set[tuple[bytes, int, int]] = set()
        self._waiting: list[LandedPage] = []
        self.times: list[float] = []
        """When pages became ready, by time.monotonic."""
        distinct = {ref.segments[-1].digest: (branch, ref) for branch, ref in refs.items() if ref.segments}
        for branch, ref in distinct.values():
            row = 0
            for segment in ref.segments:
                self._places.setdefault(segment.digest, []).append((branch, row))
                self._lengths[segment.digest] = segment.length
                row += segment.length

    def __enter__(self) -> PageLoader:
        # Before the store is read, so that no page falls between.
        self._unsubscribe = self._store.subscribe(self._on_page)
        for digest, length in self._lengths.items():
            ends = dict(self._store.layout.page_ranges(length))
            for layer, begin in self._store.ready_pages(digest):
                self._on_page(digest, layer, begin, ends[begin])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._unsubscribe()

    @property
    def complete(self) -> bool:
        """Whether every page was emitted, or waits for `flush`."""
        return len(self._seen) == self._wanted

    def flush(self) -> None:
        """Emit the pages that wait for it."""
        if self._waiting:
            self._emit(joined(self._waiting, self._store.layout.row_bytes))
            self._waiting = []

    def check(self) -> None:
        """Raise IncompleteContext unless every page was emitted."""
        if not self.complete:
            raise IncompleteContext(
                f"{len(self._seen)} of {self._wanted} pages of K/V landed; the picture was not drawn"
            )

    @property
    def _wanted(self) -> int:
        layout = self._store.layout
        return sum(layout.layers * len(layout.page_ranges(length)) for length in self._lengths.values())

    def _on_page(self, digest: bytes, layer: int, begin: int, end: int) -> None:
        # A page may come twice: from the store's list, and as it becomes ready.
        if digest not in self._places or (digest, layer, begin) in self._seen:
            return
        self._seen.add((digest, layer, begin))
        self.times.append(time.monotonic())
        k, v = self._store.offsets(digest, layer)
        skip = begin * self._store.layout.row_bytes
        if not self._waiting:
            # Later in the loop, so that pages that become ready together are one command.
            self._loop.call_soon(self.flush)
        for branch, row in self._places[digest]:
            self._waiting.append(LandedPage(branch, layer, row + begin, end - begin, k + skip, v + skip))


def joined(pages: Sequence[LandedPage], row_bytes: int) -> tuple[LandedPage, ...]:
    """Pages of one layer that follow each other as one: a rank makes few large copies of them."""
    runs: list[LandedPage] = []
    for page in sorted(pages, key=lambda each: (each.branch, each.layer, each.row)):
        if runs and _continues(runs[-1], page, row_bytes):
            runs[-1] = replace(runs[-1], rows=runs[-1].rows + page.rows)
        else:
            runs.append(page)
    return tuple(runs)


def _continues(run: LandedPage, page: LandedPage, row_bytes: int) -> bool:
    """Whether a page follows a run, in the slab and in shared memory: two segments lie apart there."""
    nbytes = run.rows * row_bytes
    return (run.branch, run.layer, run.row + run.rows, run.k_offset + nbytes, run.v_offset + nbytes) == (
        page.branch,
        page.layer,
        page.row,
        page.k_offset,
        page.v_offset,
    )
