"""CPU attention for vLLM: exact for images, whose rows attend in both directions, and for any head size.

It runs the torch engine's attention over vLLM's paged cache, one request at a time: correct rather than fast. K and V
lie unpacked in their blocks, so that the connector can copy them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from bagel_thinker.vllm.spans import Piece, pieces


@dataclass
class Row:
    """One request of a step: the place of its queries, its blocks, and the rows that each query sees."""

    query: int
    begin: int
    end: int
    blocks: Tensor
    pieces: tuple[Piece, ...]


@dataclass
class SpanMetadata:
    """The metadata that all layers of a step share."""

    num_actual_tokens: int
    slot_mapping: Tensor
    rows: list[Row]


class SpanMetadataBuilder(AttentionMetadataBuilder[SpanMetadata]):
    """Turns vLLM's description of a step into rows."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SpanMetadata:
        """Build the metadata of a step; common_prefix_len and fast_build have no effect."""
        common = common_attn_metadata
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        ranges = common.mm_req_doc_ranges or {}
        rows = []
        for i, end in enumerate(lengths):
            begin = end - (starts[i + 1] - starts[i])
            if begin == end:  # no queries in this step
                continue
            spans = [(first, last - first + 1) for first, last in ranges.get(i, ())]
            blocks = common.block_table_tensor[i, : -(-end // self._block)].long()
            rows.append(Row(starts[i], begin, end, blocks, tuple(pieces(begin, end, spans))))
        return SpanMetadata(common.num_actual_tokens, common.slot_mapping, rows)


class SpanAttention(CPUAttentionBackendImpl):
    """One layer's attention; its cache is [blocks, kv heads, block size, K | V]."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write a step's K and V, [tokens, kv heads, head size], to their slots."""
        slots = slot_mapping[slot_mapping >= 0]  # padding has the slot -1
        block = kv_cache.shape[2]
        kv_cache[slots // block, :, slots % block] = torch.cat((key, value), dim=-1)[: len(slots)]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SpanMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, heads, head size] -> output, of that shape or flat."""
        if attn_metadata is None:  # vLLM's dummy run, which only measures memory
            return output
        out = output.view(-1, self.num_heads, self.head_size)
        for row in attn_metadata.rows:
            kv = kv_cache[row.blocks].transpose(1, 2).flatten(0, 1)[: row.end]
            k, v = kv.split(self.head_size, dim=-1)
            for piece in row.pieces:
                first = row.query + piece.begin - row.begin
                places = slice(first, first + piece.end - piece.begin)
                out[places] = _attend(query[places], k[: piece.visible], v[: piece.visible], self.scale, piece.causal)
        return output


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q [queries, heads, dim], k and v [rows, kv heads, dim] -> [queries, heads, dim]."""
    queries, rows = len(q), len(k)
    mask = None
    if causal and 1 < queries < rows:
        mask = torch.ones(queries, rows, dtype=torch.bool).tril(rows - queries)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and queries == rows and queries > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


class SpanAttentionBackend(CPUAttentionBackend):
    """Replaces vLLM's CPU_ATTN."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[SpanAttention]:
        return SpanAttention

    @staticmethod
    def get_builder_cls() -> type[SpanMetadataBuilder]:
        return SpanMetadataBuilder
