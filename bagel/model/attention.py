"""One attention for everything: queries of several rows against K/V that lie in one slab.

A slab holds the K/V of all rows of a forward, each row's in an interval of its own, so that a context is
written once and every later forward adds only its own tokens. A row is one context being extended: a text
segment, an image block, one decoded token, or one branch of a picture being denoised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.model.config import LlmConfig

Rope = tuple[Tensor, Tensor]


class KvSlab:
    """K and V of all layers, k and v each [layers, tokens, kv_heads, head_dim]."""

    def __init__(self, config: LlmConfig, tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, tokens, config.num_key_value_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write K/V [..., kv_heads, head_dim] of one layer to the given token places (int64, as many)."""
        self.k[layer].index_copy_(0, slots, k.flatten(0, -3))
        self.v[layer].index_copy_(0, slots, v.flatten(0, -3))


@dataclass(frozen=True)
class Rows:
    """Where the tokens of one forward lie, the same number of tokens in every row.

    starts, lengths: each row's interval of visible K/V in the slab, its own tokens included. They are known to
    the host (the loop over rows) and lie on the device (the kernel that takes lengths there).
    und, gen: tokens a row of each expert; slots [rows * und] and [rows * gen] are their places in the slab.
    rope: rotary factors (MoTDecoder.rope), [rows, und or 1, 1, head_dim] and [rows, gen or 1, 1, head_dim], float32.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    und: int
    und_slots: Tensor
    und_rope: Rope
    gen: int = 0
    gen_slots: Tensor | None = None
    gen_rope: Rope | None = None
    causal: bool = False

    @property
    def queries(self) -> int:
        return self.und + self.gen

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query starts [rows + 1], K/V starts [rows + 1] and lengths [rows], int32."""
        device = self.und_slots.device
        query_starts = torch.arange(len(self.starts) + 1, dtype=torch.int32, device=device) * self.queries
        ends = (*self.starts, self.starts[-1] + self.lengths[-1])
        return query_starts, upload(ends, torch.int32, device), upload(self.lengths, torch.int32, device)


def upload(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small host list or tensor as a device tensor, without waiting for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attention of q [rows, queries, heads, head_dim] over one layer's slab, k and v [tokens, kv_heads, head_dim].

    Full within a row, or causal aligned at the end (rows.causal). Returns q's shape.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _attend_varlen(q, k, v, rows)
    outputs = [
        _attend_row(q[i], k[start : start + length], v[start : start + length], causal=rows.causal)
        for i, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True))
    ]
    return torch.stack(outputs) if len(outputs) > 1 else outputs[0][None]


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Flash attention with lengths on the device: one launch for all rows, whatever their lengths.

    The operator behind torch.nn.attention.varlen, which hands on grouped heads and used lengths only from torch 2.13.
    """
    query_starts, starts, lengths = rows.on_device
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1),
        k,
        v,
        query_starts,
        starts,
        rows.queries,
        rows.max_length,
        0.0,
        rows.causal,
        False,
        seqused_k=lengths,
    )[0]
    return out.view(q.shape)


def _attend_row(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """One row: q [queries, heads, head_dim], k and v [length, kv_heads, head_dim]."""
    queries, length = len(q), len(k)
    first = causal and queries == length  # without context, PyTorch's own causal order is ours
    mask = None
    if causal and 1 < queries < length:
        mask = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=first, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
