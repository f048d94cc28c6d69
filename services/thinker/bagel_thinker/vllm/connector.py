"""The Thinker's KV connector for vLLM: it copies the K/V of finished segments, layer by layer, to the store's memory.

The scheduler's half determines which segments a step completes. The worker's half copies their rows out of the paged
cache as each layer is computed. A segment found in the prefix cache is copied in the same way: its blocks hold it.
"""

from __future__ import annotations

import queue
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from bagel.engine.host_memory import pin
from bagel.telemetry.logs import Log
from bagel_thinker.vllm.sink import Notice, Outlet

log = Log("bagel.thinker")


@dataclass(frozen=True)
class Export:
    """A segment to copy: rows [begin, begin + length) of a request go to `offset` of the store's memory."""

    request: str
    digest: str
    begin: int
    length: int
    offset: int
    blocks: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.begin + self.length


@dataclass
class Exports(KVConnectorMetadata):
    """The segments that one step completes."""

    parts: list[Export] = field(default_factory=list)


class KvExport(KVConnectorBase_V1):
    """A connector that only produces K/V and never loads any."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._open: dict[str, list[Export]] = {}
        self._worker: _Worker | None = None
        if role is KVConnectorRole.WORKER:
            parallel = vllm_config.parallel_config
            outlet = Outlet.find(self._kv_transfer_config.kv_connector_extra_config["sink"])
            self._worker = _Worker(outlet, parallel.tensor_parallel_size)

    # Scheduler's half

    def on_new_request(self, request: Any) -> None:
        """Note the segments that a request exports."""
        given = (request.kv_transfer_params or {}).get("exports", [])
        self._open[request.request_id] = [Export(request.request_id, *values) for values in given]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> Exports:
        """Collect the segments whose last row this step computes or finds in the cache."""
        meta, cached = Exports(), scheduler_output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request, before in computed.items():
            waiting = self._open.get(request)
            if not waiting:
                continue
            end = before + scheduler_output.num_scheduled_tokens[request]
            due = [each for each in waiting if each.end <= end]
            if due:
                blocks = self._blocks(request)
                meta.parts += [replace(each, blocks=blocks) for each in due]
                self._open[request] = waiting[len(due) :]
        return meta

    def _blocks(self, request: str) -> tuple[int, ...]:
        """The request's blocks, in order."""
        return tuple(self._kv_cache_manager.get_block_ids(request)[0])

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request."""
        self._open.pop(request.request_id, None)
        return False, None  # False frees its blocks now; the copies are ordered before any later step

    # Worker's half

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Note the layers' caches, in order."""
        assert self._worker is not None
        self._worker.use(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Copy one layer of the segments that the step completes. Never raises, since that would end every request."""
        meta = self._get_connector_metadata()
        assert self._worker is not None
        if isinstance(meta, Exports) and meta.parts:
            self._worker.save(meta, layer_name)

    def wait_for_save(self) -> None:
        """Copy the layers that save_kv_layer was not called for, and order all copies before the next step."""
        # A captured graph makes no calls per layer. A failed forward ends here too, without having computed its rows.
        meta = self._get_connector_metadata()
        assert self._worker is not None
        if isinstance(meta, Exports) and meta.parts:
            self._worker.finish(meta, failed=sys.exc_info()[0] is not None)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Send a notice, after all copies, for each request that no more copies follow for."""
        assert self._worker is not None
        for request in sorted(finished_req_ids):
            self._worker.send(Notice(request, over=True))
        return None, None

    def shutdown(self) -> None:
        """End the thread that sends notices."""
        if self._worker is not None:
            self._worker.close()


class _Worker:
    """Copies layers out of the paged cache of one rank."""

    def __init__(self, outlet: Outlet, size: int) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        self._outlet, self._size = outlet, size
        self._rank = get_tensor_model_parallel_rank() if size > 1 else 0
        self._caches: dict[str, Tensor] = {}
        self._layers: dict[str, int] = {}
        self._saved: set[str] = set()
        self._wanted: dict[Export, Tensor] = {}
        self._failed: set[str] = set()
        self._copies: _DeviceCopies | None = None

    def use(self, caches: dict[str, Tensor]) -> None:
        self._caches = caches
        self._layers = {name: i for i, name in enumerate(caches)}
        device = next(iter(caches.values())).device
        if device.type == "cuda":
            self._copies = _DeviceCopies(device, self._outlet)

    def save(self, meta: Exports, name: str) -> None:
        """Copy one layer of all segments of a step."""
        self._saved.add(name)
        with self._copies.after_layer() if self._copies else nullcontext():
            for part in meta.parts:
                if part.request not in self._failed:
                    self._save(part, name)

    def finish(self, meta: Exports, *, failed: bool) -> None:
        """End a step: copy the layers that were not saved, or nothing more if the step failed."""
        for name in [] if failed else self._layers:
            if name not in self._saved:
                self.save(meta, name)
        self._saved.clear()
        self._wanted.clear()
        if self._copies:
            self._copies.before_next_step()

    def send(self, notice: Notice) -> None:
        """Send a notice to the engine once the copies so far are done."""
        if notice.over:
            self._failed.discard(notice.request)
        (self._copies or self._outlet).send(replace(notice, rank=self._rank))

    def close(self) -> None:
        if self._copies:
            self._copies.close()

    def _save(self, part: Export, name: str) -> None:
        try:
            layer = self._layers[name]
            target = self._target(part, layer)
            if target is not None:
                cache = self._caches[name]
                if part not in self._wanted:
                    self._wanted[part] = _index(part, cache.shape[2], cache.device)
                k, v = read_rows(cache, self._wanted[part], part.begin, part.end)
                target[0].copy_(k, non_blocking=True)
                target[1].copy_(v, non_blocking=True)
            self.send(Notice(part.request, digest=part.digest, layer=layer))
        except Exception as error:  # only this request fails
            self._failed.add(part.request)
            log.error("an export failed", request=part.request, error=repr(error))
            self.send(Notice(part.request, failure=f"its K/V could not be copied: {error}"))

    def _target(self, part: Export, layer: int) -> Tensor | None:
        """The place of this rank's heads in a segment's layer, [2, length, heads, head_dim]; None if it copies none."""
        layout = self._outlet.layout
        nbytes = layout.layer_bytes(part.length)
        memory = self._outlet.arena.slice(part.offset + layer * nbytes, nbytes)
        rows = torch.frombuffer(memory, dtype=getattr(torch, layout.dtype))
        rows = rows.view(2, part.length, layout.kv_heads, layout.head_dim)
        copies = max(1, self._size // layout.kv_heads)  # vLLM replicates heads if there are more ranks than heads
        if self._rank % copies:
            return None
        heads = max(1, layout.kv_heads // self._size)
        first = self._rank // copies * heads
        return rows[:, :, first : first + heads]


class _DeviceCopies:
    """Copies on a GPU, parallel to its computation: a stream that follows each layer, and a thread that sends notices.

    The store's memory is pinned if the driver allows it, so that the computation never waits for a copy.
    """

    def __init__(self, device: torch.device, outlet: Outlet) -> None:
        self._device, self._outlet = device, outlet
        self._stream = torch.cuda.Stream(device)
        self._queue: queue.SimpleQueue[tuple[Any, Notice] | None] = queue.SimpleQueue()
        pin(torch.frombuffer(outlet.arena.buffer, dtype=torch.uint8), device)
        self._thread = threading.Thread(target=self._send_all, name="kv-copies", daemon=True)
        self._thread.start()

    def after_layer(self) -> AbstractContextManager[Any]:
        """A context whose work runs parallel to the computation, after everything launched so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def before_next_step(self) -> None:
        """Make later launches wait, on the device, for the copies so far: they may overwrite the copied blocks."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def send(self, notice: Notice) -> None:
        """Send a notice once the copies so far are done."""
        event = torch.cuda.Event()
        event.record(self._stream)
        self._queue.put((event, notice))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(10)

    def _send_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            event, notice = entry
            event.synchronize()
            self._outlet.send(notice)


def read_rows(cache: Tensor, wanted: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """K and V of rows [begin, end) of a request, each [rows, kv heads, head_dim].

    cache: one layer, [blocks, kv heads, block size, K | V]; wanted: the blocks of these rows, in order.
    """
    size = cache.shape[2]
    rows = cache[wanted].transpose(1, 2).flatten(0, 1)
    pair = torch.stack(rows.chunk(2, dim=-1))
    first = begin - begin // size * size
    k, v = pair[:, first : first + end - begin]
    return k, v


def _index(part: Export, size: int, device: torch.device) -> Tensor:
    """The blocks, of `size` rows each, that hold a segment. They are the same in all layers."""
    wanted = torch.tensor(part.blocks[part.begin // size : -(-part.end // size)])
    return wanted.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else wanted
