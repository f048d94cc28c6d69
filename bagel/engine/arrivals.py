"""K/V that arrive in shared memory, on their way to the slab, beside the steps of other pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagel.engine.commands import LandedPage
from bagel.engine.host_memory import Staging, pin, unpin
from bagel.engine.progress import Heartbeat
from bagel.model.attention import KvSlab
from bagel.parallel.mesh import Share
from bagel.prompts import BranchName


class _Twin(NamedTuple):
    """Rows of a layer that are in the slab from token `source` on, and that another branch has from `target` on."""

    layer: int
    source: int
    target: int
    rows: int


@dataclass(eq=False)
class Arrival:
    """The K/V of one picture. place: the token of the slab where a branch's context begins; rows: of each layer.

    placed: after all that its place was used for before. over: nothing more is copied for it; landed: nothing of it is
    under way on the device. copied: rows of each layer, with those of twins; layers: those from the first on that have
    all of theirs; reached: after the copies of these out of shared memory; twins: still to be copied. All of these
    change under the lock.
    """

    id: int
    place: Callable[[BranchName], int]
    rows: int
    placed: torch.cuda.Event | None
    copied: list[int]
    over: bool = False
    landed: bool = False
    layers: int = 0
    reached: torch.cuda.Event | None = None
    twins: list[_Twin] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def count(self, pages: Sequence[LandedPage]) -> bool:
        """Count pages that are copied; whether they complete a layer that all before it are complete for."""
        for page in pages:
            self.copied[page.layer] += page.rows
        before = self.layers
        while self.layers < len(self.copied) and self.copied[self.layers] == self.rows:
            self.layers += 1
        return self.layers > before


class Arrivals:
    """One thread, and on a GPU one stream, that copy pages from shared memory to the slab.

    The engine's thread only hands pages in, so no step waits for a copy. A picture takes its first step after the call
    that `finish` makes, when its K/V are there and shared memory is read no more.
    """

    def __init__(
        self,
        slab: KvSlab,
        memory: Tensor,
        heads: Share,
        heartbeat: Heartbeat,
        fail: Callable[[int, Exception], None],
        on_layers: Callable[[int], None] = lambda id_: None,
    ) -> None:
        """memory: shared memory, uint8, with rows of all heads; heads: those of them that the slab has.

        fail: receives the error of a picture, on the thread; on_layers: is told there of a picture that has more of its
        first layers than before, but not all.
        """
        self._slab, self._memory, self._heads, self._heartbeat, self._fail = slab, memory, heads, heartbeat, fail
        self._on_layers = on_layers
        self._device = slab.k.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # On a CPU a plain copy is all there is to do.
        self._direct = pin(memory, self._device) or self._stream is None
        self._staging: Staging | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-arrivals")

    def open(self, id_: int, place: Callable[[BranchName], int], rows: int) -> Arrival:
        """A picture has its place in the slab, and gets so many rows in each layer.

        Call this after whatever was launched to clear the place.
        """
        placed = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        return Arrival(id_, place, rows, placed, [0] * len(self._slab.k))

    def copy(self, arrival: Arrival, pages: Sequence[LandedPage]) -> None:
        """Copy pages to a picture's place, in the background."""
        self._submit(arrival, lambda: self._copy(arrival, pages))

    def finish(self, arrival: Arrival, done: Callable[[], None]) -> None:
        """Call `done` on the thread once all pages so far are in the slab; never if the picture is dropped before."""
        self._submit(arrival, lambda: self._finish(arrival, done))

    @torch.inference_mode()
    def reach(self, arrival: Arrival) -> int:
        """How many of a picture's first layers all later work on the present stream sees."""
        with arrival.lock:
            if arrival.reached is not None:
                torch.cuda.current_stream(self._device).wait_event(arrival.reached)
            self._copy_twins(arrival, arrival.layers)
            return arrival.layers

    def drop(self, arrival: Arrival) -> None:
        """A picture gives up its place: nothing is written there any more. Waits for the piece that is being copied."""
        with arrival.lock:
            arrival.over = True
            if self._stream is not None and not arrival.landed:
                # What is under way goes on; whoever gets the place next comes after it.
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """Wait for the job under way, and end."""
        self._thread.shutdown(cancel_futures=True)
        if self._stream is not None and self._direct:
            self._stream.synchronize()
            unpin(self._memory)

    def _submit(self, arrival: Arrival, job: Callable[[], None]) -> None:
        def watched() -> None:
            try:
                with self._heartbeat.work(), torch.inference_mode(), self._on_stream():
                    job()
            except Exception as error:
                # Its later pages would fail in the same way, and it must not begin without these.
                with arrival.lock:
                    was_over, arrival.over = arrival.over, True
                if not was_over:
                    self._fail(arrival.id, error)

        self._thread.submit(watched)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _copy(self, arrival: Arrival, pages: Sequence[LandedPage]) -> None:
        if self._stream is not None and arrival.placed is not None:
            self._stream.wait_event(arrival.placed)
        starts: dict[tuple[int, int], int] = {}
        for page in pages:
            # Page by page, so that `drop` waits for one page at most.
            with arrival.lock:
                if arrival.over:
                    return
                start = arrival.place(page.branch) + page.row
                first = starts.setdefault((page.k_offset, page.rows), start)
                if first != start:
                    # Another branch begins alike, and a device copies its own memory far faster than the host's.
                    arrival.twins.append(_Twin(page.layer, first, start, page.rows))
                    continue
                for tensor, offset in ((self._slab.k, page.k_offset), (self._slab.v, page.v_offset)):
                    self._copy_rows(tensor[page.layer, start : start + page.rows], offset)
        with arrival.lock:
            if not arrival.count(pages):
                return
            if self._stream is not None:
                arrival.reached = self._stream.record_event()
            more = arrival.layers < len(arrival.copied)
        if more:
            self._on_layers(arrival.id)

    def _copy_twins(self, arrival: Arrival, layers: int) -> None:
        """Launch what is left to copy within the first so many layers, whose rows the present stream sees.

        Not as they land: such a copy runs where a step does, so that with each of them a GPU would leave the work of
        another process, as a Thinker's that computes the very context, and go back to it.
        """
        ready = [twin for twin in arrival.twins if twin.layer < layers]
        arrival.twins = [twin for twin in arrival.twins if twin.layer >= layers]
        for layer, source, target, rows in ready:
            for tensor in (self._slab.k[layer], self._slab.v[layer]):
                tensor[target : target + rows] = tensor[source : source + rows]

    def _copy_rows(self, target: Tensor, offset: int) -> None:
        """Rows of K or V from shared memory to the slab, [rows, kv_heads, head_dim]."""
        rows, heads, width = target.shape
        nbytes = rows * self._heads.whole * width * target.element_size()
        # A view: the copy to the device is the only one.
        source = self._memory[offset : offset + nbytes].view(target.dtype).view(rows, self._heads.whole, width)
        if heads != self._heads.whole:
            source = source[:, self._heads.start : self._heads.stop]
        if self._stream is None or (self._direct and source.is_contiguous()):
            target.copy_(source, non_blocking=True)
            return
        if self._staging is None:
            self._staging = Staging(self._device)
        self._staging.copy(target, source)

    def _finish(self, arrival: Arrival, done: Callable[[], None]) -> None:
        with arrival.lock:
            if not arrival.over:
                self._copy_twins(arrival, len(self._slab.k))
        if self._stream is not None:
            # Blocking, so that the wait takes no processor from the thread that launches steps.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
            copied.synchronize()
        with arrival.lock:
            if arrival.over:
                return
            arrival.landed = True
        done()
