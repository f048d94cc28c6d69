"""GPU attention for vLLM: FlashAttention in which the rows of an image see all of the image.

Steps without an image run vLLM's own FlashAttention, graphs included. In other steps the queries are split where images
begin and end: one causal call attends for all text, one full call for all images, over the same paged cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from bagel_thinker.vllm.spans import Piece, pieces

Ranges = Mapping[int, Sequence[tuple[int, int]]]
"""The first and the last row of each image, by the request's place in the step."""


@dataclass
class Call:
    """One call of the attention: the rows of a step whose queries it takes, and its metadata."""

    rows: Tensor
    metadata: FlashAttentionMetadata


@dataclass
class Step:
    """The host's description of a step. calls: None until the first layer runs; empty if vLLM's own call is right."""

    starts: Tensor
    ends: Tensor
    ranges: Ranges
    calls: list[Call] | None = None


class SpanFlashBuilder(FlashAttentionMetadataBuilder):
    """Adds the places of images to vLLM's description of a step."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Build vLLM's metadata, and add the step."""
        common = common_attn_metadata
        # Without the ranges: vLLM's own handling of images needs FlashAttention 4.
        plain = replace(common, mm_req_doc_ranges=None)
        metadata: Any = super().build(common_prefix_len, plain, fast_build)
        metadata.step = step_of(common, common.mm_req_doc_ranges)
        return metadata


def step_of(common: Any, ranges: Ranges | None) -> Step:
    """A step from vLLM's description."""
    # The upper bound is exact wherever it matters: a request that computes several rows has computed all before them.
    return Step(common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, ranges or {})


class SpanFlashAttention(FlashAttentionImpl):
    """One layer's attention."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, heads, head size] -> output, of that shape."""
        calls = _calls(attn_metadata) if attn_metadata is not None else []
        scales = output_scale, output_block_scale
        if not calls:
            out: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return out
        for call in calls:
            some = query[call.rows]
            out = torch.empty_like(some)
            super().forward(layer, some, key, value, kv_cache, call.metadata, out, *scales)
            output[call.rows] = out
        return output


def _calls(metadata: Any) -> list[Call]:
    """The calls of a step, made once for all layers; empty if the step has no image."""
    step: Step = metadata.step
    if step.calls is None:
        # A single query is the request's last row, which sees all rows in either way.
        step.calls = [] if metadata.max_query_len == 1 else _split(metadata, step)
    return step.calls


def _split(metadata: FlashAttentionMetadata, step: Step) -> list[Call]:
    starts, ends = step.starts.tolist(), step.ends.tolist()
    found: dict[bool, list[tuple[int, int, Piece]]] = {True: [], False: []}
    for i, end in enumerate(ends):
        begin = end - (starts[i + 1] - starts[i])
        spans = [(first, last - first + 1) for first, last in step.ranges.get(i, ())]
        for piece in pieces(begin, end, spans):
            found[piece.causal].append((i, starts[i] - begin, piece))
    if not found[False]:
        return []
    return [_call(metadata, some, causal) for causal, some in found.items() if some]


def _call(metadata: FlashAttentionMetadata, some: Sequence[tuple[int, int, Piece]], causal: bool) -> Call:
    """One call for pieces: (the request's place in the step, the offset from its rows to the step's, the piece)."""
    device = metadata.block_table.device
    lengths = [piece.end - piece.begin for _, _, piece in some]
    visible = [piece.visible for _, _, piece in some]
    rows = torch.cat([torch.arange(piece.begin + shift, piece.end + shift) for _, shift, piece in some])
    changed = replace(
        metadata,
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        query_start_loc=_on(device, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)),
        max_seq_len=max(visible),
        seq_lens=_on(device, torch.tensor(visible, dtype=torch.int32)),
        block_table=metadata.block_table[_on(device, torch.tensor([i for i, _, _ in some]))],
        use_cascade=False,
        common_prefix_len=0,
        scheduler_metadata=None,
        max_num_splits=0,
        causal=causal,
    )
    return Call(_on(device, rows), changed)


def _on(device: torch.device, values: Tensor) -> Tensor:
    """Copy values to a device; on a GPU the host does not wait, since the memory is pinned."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


class SpanFlashBackend(FlashAttentionBackend):
    """Replaces vLLM's FLASH_ATTN."""

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Answer as vLLM does for text: with images it would demand FlashAttention 4."""
        reason: str | None = super().supports_combination(
            head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, False, device_capability
        )
        return reason

    @staticmethod
    def get_impl_cls() -> type[SpanFlashAttention]:
        return SpanFlashAttention

    @staticmethod
    def get_builder_cls() -> type[SpanFlashBuilder]:
        return SpanFlashBuilder
