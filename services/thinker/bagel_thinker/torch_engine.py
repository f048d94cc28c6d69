"""The exact engine: bagel.engine in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue

import torch
from PIL.Image import Image

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.context import ContextBuilder, SegmentCache, SegmentKv
from bagel.engine.loading import LoadedModel, kv_layout, load_role
from bagel.engine.memory import kv_space
from bagel.engine.prefill_graphs import PrefillGraphs
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import ContextEvent, ContextFailed, ContextRequest, TextScheduler
from bagel.engine.warm_up import warm_up
from bagel.errors import Draining, NotFinite, UnknownSegment
from bagel.kv.store import KvStore
from bagel.model.device import DTYPES, choose_device, choose_dtype
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import count_step
from bagel_thinker.engine import died, internal_error
from bagel_thinker.export import KvLane, Outlet
from bagel_thinker.watchdog import Pulse

NEAR_CACHE_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Segments kept on the device, by its type, to go on from without a copy out of shared memory.

The image blocks of an edit of the largest size take half a gigabyte.
"""

log = Log("bagel.thinker")


class StoreCache:
    """The builder's cache: segments on the device first, then those in the store's shared memory."""

    def __init__(self, store: KvStore, lane: KvLane, device: torch.device) -> None:
        self._store, self._lane, self._device = store, lane, device
        self._near = SegmentCache(NEAR_CACHE_BYTES[device.type])

    def get(self, digest: bytes) -> SegmentKv | None:
        """A segment's K/V. What is near, but was reserved in the store, is written there: a DiT will pull it."""
        near = self._near.get(digest)
        if near is not None:
            self._lane.segment(digest, near)
            return near
        try:
            # Pinned, so that it is not evicted while it is read.
            pinned = self._store.pin(digest)
        except UnknownSegment:
            return None
        try:
            if not self._complete(digest):
                return None
            kv = self._load(digest)
        finally:
            self._store.unpin(pinned)
        self._near.put(digest, kv)
        return kv

    def has(self, digest: bytes) -> bool:
        """Whether a segment need not be computed. What is near goes to the store as by `get`."""
        if (near := self._near.get(digest)) is not None:
            self._lane.segment(digest, near)
            return True
        return self._complete(digest)

    def put(self, digest: bytes, entry: SegmentKv) -> None:
        """Keep a segment near by; the store has got it layer by layer."""
        self._near.put(digest, entry)

    def _load(self, digest: bytes) -> SegmentKv:
        """A copy of a segment: what a build goes on from must not change under it when the store evicts."""
        stored = self._store.load(digest)
        k, v = (torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) for tensor in stored)
        # Layer by layer, as each lies in one piece: the driver copies no other without a copy on the host first.
        for layer in range(len(k)):
            for target, source in zip((k, v), stored, strict=True):
                target[layer].copy_(source[layer], non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return SegmentKv(k, v)

    def _complete(self, digest: bytes) -> bool:
        """Whether the store has a segment, or is about to have it."""
        if self._lane.fills([digest]):
            self._lane.wait()
        return self._store.is_complete(digest)


class TorchEngine:
    """The torch engine behind the Engine protocol."""

    name = "torch"

    def __init__(
        self,
        loaded: LoadedModel,
        store: KvStore,
        *,
        model_name: str,
        max_num_seqs: int,
        kv_device_bytes: int | None = None,
    ) -> None:
        """kv_device_bytes: memory of the device for the K/V of texts under way, as `kv_space` takes it."""
        self.store, self.planner, self._loaded = store, loaded.planner, loaded
        self.failed: Future[None] = Future()
        self._lane = KvLane(store, loaded.model.device)
        self.pulse = Pulse(beside=self._lane.pulse)
        self.info = loaded.info(model_name)
        self._space = kv_space(loaded.model, kv_device_bytes)
        self._texts = TextScheduler(
            loaded,
            ContextBuilder(
                loaded.model,
                StoreCache(store, self._lane, loaded.model.device),
                PrefillGraphs.over(loaded.model, self._space),
            ),
            self._space,
            max_num_seqs=max_num_seqs,
            on_write=partial(count_step, "text"),
        )
        # Only the engine's thread touches the model and the scheduler; others hand it what to call.
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        model_name: str,
        checkpoint: Checkpoint,
        *,
        device: str,
        dtype: str,
        kv_store_bytes: int,
        max_num_seqs: int,
        max_model_len: int | None = None,
        kv_device_bytes: int | None = None,
        role: Role = Role.CONTEXT,
        enforce_eager: bool = False,
    ) -> TorchEngine:
        """Load a checkpoint; device and dtype as `bagel.model.device` takes them.

        role: understand loads no generation expert; images to edit then end their request with NotSupported.
        enforce_eager: no fused kernels, no CUDA graphs, no warm-up.
        """
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        loaded = load_role(
            checkpoint,
            role,
            dtype=DTYPES[kind],
            device=place,
            max_model_len=max_model_len,
            enforce_eager=enforce_eager,
        )
        store = KvStore(kv_layout(checkpoint, kind), loaded.kv_fingerprint, kv_store_bytes)
        near = NEAR_CACHE_BYTES[place.type]
        log.info("memory", weights_bytes=loaded.memory(), kv_store_bytes=kv_store_bytes, near_cache=near)
        engine = cls(loaded, store, model_name=model_name, max_num_seqs=max_num_seqs, kv_device_bytes=kv_device_bytes)
        if place.type == "cuda" and not enforce_eager:
            engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Do the work that the first request would otherwise wait for, on the engine's thread. Raises OutOfMemory."""
        done: Future[None] = Future()

        def work() -> None:
            try:
                warm_up(self._loaded, self._space, None, self._texts)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._commands.put(work)
        done.result()

    def encode_ahead(self, image: Image) -> Future[None]:
        """Encode an image before its request comes."""
        encoded: Future[None] = Future()

        def encode() -> None:
            if not encoded.set_running_or_notify_cancel():
                return
            try:
                self._texts.builder.latents.encode_ahead(image)
            except Exception as error:
                encoded.set_exception(error)
            else:
                encoded.set_result(None)

        self._commands.put(encode)
        return encoded

    def submit(self, request: ContextRequest) -> None:
        """Start a request."""
        # The store is what its caller asks for.
        request.with_kv = False
        outlet = Outlet(self._lane, self.store.layout.layers, request)

        def emit(event: ContextEvent) -> None:
            # Each layer is progress: all of a large image are one unit of work.
            self.pulse.beat()
            outlet.emit(event)

        request.emit = emit
        self._commands.put(lambda: self._start(request))

    def cancel(self, request: ContextRequest) -> None:
        """Drop a request."""
        self._commands.put(lambda: self._texts.cancel(request))

    def close(self) -> None:
        """Stop the thread after the unit of work under way."""
        self._commands.put(None)
        self._thread.join()
        self._lane.close()

    def _run(self) -> None:
        if self._loaded.model.device.type == "cuda":
            # A current device belongs to a thread.
            torch.cuda.set_device(self._loaded.model.device)
        while True:
            try:
                while self._take_commands():
                    self.pulse.beat()
                    self._texts.work()
                self._texts.abandon(Draining("the Thinker has shut down; send the request again"))
                return
            except Exception as error:
                log.error("the engine failed", exc_info=True)
                self._recover(error)

    def _take_commands(self) -> bool:
        """Run what waits; blocks while there is nothing else to do. False: stop."""
        while True:
            if not self._texts.busy:
                # Waiting for work is no hang.
                self.pulse.rest()
            try:
                command = self._commands.get(block=not self._texts.busy)
            except Empty:
                return True
            self.pulse.beat()
            if command is None:
                return False
            command()

    def _start(self, request: ContextRequest) -> None:
        if self.failed.done():
            request.emit(ContextFailed(died()))
            return
        try:
            self._texts.add(request)
        except Exception as error:
            request.emit(ContextFailed(error))

    def _recover(self, error: Exception) -> None:
        """Fail all requests. An engine that can compute no more takes no others, and says so in `failed`."""
        self._texts.abandon(internal_error(error))
        if self.failed.done():
            return
        try:
            self._check()
        except Exception:
            log.error("the engine cannot go on", exc_info=True)
            self.failed.set_exception(died())
        else:
            log.warning("the engine goes on")

    def _check(self) -> None:
        """Compute a short text past all caches; raises what is wrong with the engine."""
        builder = ContextBuilder(self._loaded.model, SegmentCache(0))
        context = builder.build(self.planner.append_text(Chain(), "ok"))
        if not all(kv.k.isfinite().all() and kv.v.isfinite().all() for kv in context.kv):
            raise NotFinite("the K/V of a short text are not finite")
