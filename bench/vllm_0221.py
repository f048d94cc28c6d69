"""What the Thinker's vLLM needs to run on vLLM 0.22.1, for a machine whose PyTorch fits no later one. Not supported.

Its cache has another shape, its scheduler tells connectors no block tables, and it looks for M-RoPE elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.version import __version__

from bagel_thinker.vllm import connector, core, gpu_attention, settings
from bagel_thinker.vllm.connector import Exports, KvExport


class KvExport0221(KvExport):
    """Keeps the requests' block tables itself."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._tables: dict[str, list[int]] = {}

    def build_connector_meta(self, scheduler_output: Any) -> Exports:
        """As KvExport's, after taking in the step's new blocks."""
        for new in scheduler_output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
        cached = scheduler_output.scheduled_cached_reqs
        for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if blocks:
                kept = [] if request in cached.resumed_req_ids else self._tables[request]
                self._tables[request] = [*kept, *blocks[0]]
        return super().build_connector_meta(scheduler_output)

    def _blocks(self, request: str) -> tuple[int, ...]:
        return tuple(self._tables[request])

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request."""
        self._tables.pop(request.request_id, None)
        return super().request_finished(request, block_ids)


def read_rows(cache: Tensor, wanted: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """As connector.read_rows, of [2, blocks, block size, kv heads, head_dim] or [blocks, 2, block size, …]."""
    pair_first = cache if cache.shape[0] == 2 else cache.transpose(0, 1)
    size = pair_first.shape[2]
    pair = torch.index_select(pair_first, 1, wanted).flatten(1, 2)
    first = begin - begin // size * size
    k, v = pair[:, first : first + end - begin]
    return k, v


def build(builder: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
    """As SpanFlashBuilder.build; the runner says where images lie only later, as `mm_prefix_range`."""
    made: Any = super(gpu_attention.SpanFlashBuilder, builder).build(
        common_prefix_len, common_attn_metadata, fast_build
    )
    made.step = gpu_attention.step_of(common_attn_metadata, None)
    return made


def calls(metadata: Any) -> list[gpu_attention.Call]:
    """As gpu_attention._calls, with the images that the runner has told of."""
    metadata.step.ranges = getattr(metadata, "mm_prefix_range", None) or {}
    return _calls(metadata)


_calls = gpu_attention._calls


def adapt() -> None:
    """Change what differs, in this process."""
    arguments, config = settings.engine_arguments, settings.hf_config

    def engine_arguments(*given: Any, **named: Any) -> dict[str, Any]:
        made = arguments(*given, **named)
        transfer = made["kv_transfer_config"]
        transfer |= {"kv_connector": "KvExport0221", "kv_connector_module_path": "bench.vllm_0221"}
        return made

    def hf_config(*given: Any) -> dict[str, Any]:
        made = config(*given)
        made["rope_parameters"] = {"rope_type": "default", "mrope_section": made["mrope_section"]}
        return made

    for module, name, value in (
        (settings, "hf_config", hf_config),
        (core, "engine_arguments", engine_arguments),
        (connector, "read_rows", read_rows),
        (gpu_attention, "_calls", calls),
        (gpu_attention.SpanFlashBuilder, "build", build),
        # Nothing here asks for FlashAttention 4, and there is one argument less.
        (gpu_attention.SpanFlashBackend, "supports_combination", FlashAttentionBackend.supports_combination),
    ):
        setattr(module, name, value)


def prepare(attention: str | None) -> None:
    """Before an engine is made: adapt if this is vLLM 0.22; take an attention backend by name, if one is given."""
    if __version__.startswith("0.22."):
        adapt()
    if attention is not None:
        arguments = vars(core)["engine_arguments"]
        backend = {"attention_backend": AttentionBackendEnum[attention]}
        vars(core)["engine_arguments"] = lambda *given, **named: {**arguments(*given, **named), **backend}
