"""Computed K/V on their way from the engine to the store, beside the work that follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Condition, Lock, Thread

import torch
from torch import Tensor

from bagel.engine.context import SegmentKv
from bagel.engine.host_memory import pin, unpin
from bagel.engine.text_scheduler import (
    ChainExtended,
    ContextDone,
    ContextEvent,
    ContextFailed,
    ContextRequest,
    LayersComputed,
)
from bagel.errors import UnknownSegment
from bagel.kv.segment import Claim
from bagel.kv.store import KvStore
from bagel.telemetry.logs import Log
from bagel_thinker.watchdog import Pulse

log = Log("bagel.thinker")

OnWritten = Callable[[Exception | None], None]
"""Called on the lane's thread once layers are in the store, or with the error that kept them out."""

Rows = Sequence[Tensor]
"""K and V of some layers of a segment, one after the other, each [length, kv_heads, head_dim]."""


@dataclass
class _Copy:
    """Layers on their way. sources: kept until the copy out of them is done; staged: on the host, to be copied on."""

    targets: Rows
    sources: Rows
    staged: Rows
    copied: torch.cuda.Event | None

    def finish(self) -> None:
        """Wait for the device, and write to the store what it has not written there itself."""
        if self.copied is not None:
            self.copied.synchronize()
        for target, staged in zip(self.targets, self.staged, strict=False):
            target.copy_(staged)


class KvLane:
    """A thread, and on a GPU a stream, that copy layers to the store in the order in which they come.

    The engine's thread hands layers in and goes on. A layer is announced to those who pull it once it is in the
    store's memory. Used by the engine's thread alone.
    """

    def __init__(self, store: KvStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._memory = torch.frombuffer(store.arena.buffer, dtype=torch.uint8)
        self._pinned = pin(self._memory, device)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Around the two that follow.
        self._idle = Condition()
        self._open, self._filling = 0, dict[bytes, Claim]()
        self.pulse = Pulse()
        self._thread = Thread(target=self._run, name="torch-engine-kv", daemon=True)
        self._thread.start()

    def claim(self, digest: bytes) -> bool:
        """Whether a segment is to be written to the store: a lease has reserved it, and nobody else has filled it.

        Its memory is kept until `release`.
        """
        try:
            if (claim := self._store.claim(digest)) is None:
                return False
            self._store.pin(digest)
        except UnknownSegment:
            return False
        with self._idle:
            self._filling[digest] = claim
        return True

    def copy(self, digest: bytes, layers: range, k: Tensor, v: Tensor, written: OnWritten) -> None:
        """Copy layers of a claimed segment, k and v [layers, length, kv_heads, head_dim], and mark them as ready."""
        targets, sources = list[Tensor](), list[Tensor]()
        for layer, *pair in zip(layers, k, v, strict=True):
            if (rows := self._store.layer_rows(digest, layer)) is not None:
                targets += rows
                sources += pair
        copy = self._launch(sources, targets)

        def job() -> None:
            try:
                copy.finish()
                for layer in layers:
                    self._store.mark_layer(digest, layer)
            except Exception as error:
                written(error)
            else:
                written(None)

        self._put(job)

    def release(self, digest: bytes) -> None:
        """Let go of a claimed segment after the copies so far: others may want what was not written of it."""

        def job() -> None:
            with self._idle:
                claim = self._filling.pop(digest)
            # Only now: as soon as it is given back, the engine's thread may claim the same segment again.
            self._store.unclaim(claim)
            self._store.unpin(claim.segment)

        self._put(job)

    def segment(self, digest: bytes, kv: SegmentKv) -> None:
        """Write a whole segment to the store, if it is wanted there."""
        if not self.claim(digest):
            return

        def written(error: Exception | None) -> None:
            if error is not None:
                log.warning("a segment was not stored", digest=digest.hex(), error=repr(error))

        # Each by itself, so that the first ones are sent while the others are copied.
        for layer in range(len(kv.k)):
            one = slice(layer, layer + 1)
            self.copy(digest, range(layer, layer + 1), kv.k[one], kv.v[one], written)
        self.release(digest)

    def after(self, call: Callable[[], None]) -> None:
        """Call this on the lane's thread once all that was handed in so far is done."""
        self._put(call)

    def fills(self, digests: Iterable[bytes]) -> bool:
        """Whether any of these segments is on its way to the store."""
        with self._idle:
            return not self._filling.keys().isdisjoint(digests)

    def wait(self) -> None:
        """Wait until all that was handed in so far is done."""
        with self._idle:
            self._idle.wait_for(lambda: not self._open)

    def close(self) -> None:
        """Stop the thread after what was handed in so far."""
        self._jobs.put(None)
        self._thread.join()
        if self._pinned:
            unpin(self._memory)

    def _launch(self, sources: Rows, targets: Rows) -> _Copy:
        if self._stream is None:
            return _Copy(targets, sources, sources, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            staged: Rows = ()
            if self._pinned:
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source, non_blocking=True)
            else:
                # PyTorch pins the memory of such a copy: the driver cannot write to the store's by itself.
                staged = [source.to("cpu", non_blocking=True) for source in sources]
            # Blocking, so that the wait takes no processor from the thread that launches layers.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        return _Copy(targets, sources, staged, copied)

    def _put(self, job: Callable[[], None]) -> None:
        with self._idle:
            self._open += 1
        self._jobs.put(job)

    @torch.inference_mode()
    def _run(self) -> None:
        if self._stream is not None:
            # A current device belongs to a thread.
            torch.cuda.set_device(self._device)
        while (job := self._jobs.get()) is not None:
            self.pulse.beat()
            try:
                job()
            except Exception:
                log.error("a call behind K/V failed", exc_info=True)
            self.pulse.rest()
            # Its tensors go now, and not when the next job comes.
            del job
            with self._idle:
                self._open -= 1
                self._idle.notify_all()


class Outlet:
    """The way out for one request's events: its layers go to the store, and what follows is said once they are there.

    Texts of other requests do not wait for them.
    """

    def __init__(self, lane: KvLane, layers: int, request: ContextRequest) -> None:
        """layers: of a segment. The request's layers that go to the store are timed by when they are there."""
        self._lane, self._layers = lane, layers
        self._emit, self._layer_times = request.emit, request.layer_times
        self._filling = set[bytes]()
        self._failed: Exception | None = None
        self._lock, self._open = Lock(), 0

    def emit(self, event: ContextEvent) -> None:
        """Take an event from the engine's thread. Raises what the store refused a layer with."""
        match event:
            case LayersComputed():
                self._write(event)
            case ChainExtended():
                # Its receiver reserves room before the engine goes on, so it cannot come later.
                self._lane.wait()
                self._pass_on(event)
            case ContextDone():
                # Segments that were known may be on their way to the store too.
                digests = [segment.digest for segment in event.context.chain.segments]
                self._follow(event, directly=not self._open and not self._lane.fills(digests))
            case ContextFailed() if self._filling:
                # Others may want the segments that this request did not finish.
                for digest in self._filling:
                    self._lane.release(digest)
                self._filling.clear()
                self._follow(event, directly=False)
            case _:
                self._follow(event, directly=not self._open)

    def _follow(self, event: ContextEvent, *, directly: bool) -> None:
        """Pass an event on behind what is under way of this request."""
        if directly:
            self._pass_on(event)
            return
        self._count(1)

        def call() -> None:
            self._pass_on(event)
            self._count(-1)

        self._lane.after(call)

    def _pass_on(self, event: ContextEvent) -> None:
        self._emit(event if self._failed is None else ContextFailed(self._failed))

    def _write(self, event: LayersComputed) -> None:
        if self._failed is not None:
            raise self._failed
        digest = event.segment.digest
        # One claim for all layers of a segment.
        if event.layers.start == 0 and self._lane.claim(digest):
            self._filling.add(digest)
        if digest not in self._filling:
            return
        times = self._layer_times[digest]

        def written(error: Exception | None) -> None:
            times[event.layers.start : event.layers.stop] = [time.monotonic()] * len(event.layers)
            if error is not None:
                self._failed = error
            self._count(-1)

        self._count(1)
        self._lane.copy(digest, event.layers, event.k, event.v, written)
        if event.layers.stop == self._layers:
            self._lane.release(digest)
            self._filling.discard(digest)

    def _count(self, change: int) -> None:
        # Changed by the engine's thread and by the lane's.
        with self._lock:
            self._open += change
