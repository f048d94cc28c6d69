"""Rows of a forward and the slab of K/V that they attend to.

A slab holds the K/V of all rows of a forward, each row's in an interval of its own, so that a context is written once
and every later forward adds only its own tokens. A row is one context being extended: a text segment, an image block,
one decoded token, or one branch of a picture being denoised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from bagel.model.kernels import Rope
from bagel.parallel.context import LatentKv


@dataclass(frozen=True)
class KvShape:
    """The K/V of one token as one rank keeps them: layers, K/V heads of its share, width of a head."""

    layers: int
    heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.layers * self.heads * self.head_dim * dtype.itemsize


class KvSlab:
    """K and V of all layers, k and v each [layers, tokens, kv_heads, head_dim]."""

    def __init__(self, shape: KvShape, tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        sizes = (shape.layers, tokens, shape.heads, shape.head_dim)
        # Zeros, as some attention reads rows that are not written yet (LayerBackend.read_ahead).
        self.k, self.v = _zeros(sizes, dtype, device), _zeros(sizes, dtype, device)

    def clear(self, start: int, tokens: int) -> None:
        """Set the tokens from `start` on to zero, in all layers."""
        self.k[:, start : start + tokens].zero_()
        self.v[:, start : start + tokens].zero_()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [tokens, kv_heads, head_dim]."""
        return self.k[layer], self.v[layer]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU their memory is taken page by page as it is written: torch.zeros would take all of it at once."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class QueryBlock:
    """Queries begin to begin + count of a forward. They see `length` tokens of K/V from `start` on."""

    begin: int
    count: int
    start: int
    length: int


@dataclass(frozen=True)
class Rows:
    """Where the tokens of one forward lie. Every row has the same number of tokens.

    Everything that differs from row to row is a tensor on the device, derived from a few integers a row
    (bagel.engine.layout), so that a captured forward can be replayed for other places.

    starts, lengths: each row's interval of visible K/V in the slab, its own tokens included, [rows] int64.
    longest: no row sees more tokens than this.
    und, gen: tokens a row that each expert computes here; und_slots [rows * und]: places of und's in the slab, gen_kv:
    those of gen's, and of the latents of other ranks (bagel.parallel.context).
    rope: rotary factors (MoTDecoder.rope), [rows, und or 1, 1, head_dim] and [rows, gen or 1, 1, head_dim], float32.
    intervals: starts and lengths again, on the host, for attention that loops over rows there. None in a captured
    forward, which has no fixed ones.
    """

    starts: Tensor
    lengths: Tensor
    longest: int
    und: int
    und_slots: Tensor
    und_rope: Rope
    gen: int = 0
    gen_kv: LatentKv | None = None
    gen_rope: Rope | None = None
    causal: bool = False
    intervals: Sequence[tuple[int, int]] | None = None

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.starts)

    @property
    def queries(self) -> int:
        """All queries of the forward."""
        return self.count * (self.und + self.gen)

    @property
    def max_queries(self) -> int:
        return max(self.und, self.gen)

    @cached_property
    def blocks(self) -> tuple[QueryBlock, ...]:
        """What attends to what: all rows' und queries, row after row, then their gen queries.

        Each expert's queries lie together, as each makes its own. Without a causal order the two experts of a row may
        attend apart: the result is the same.
        """
        assert self.intervals is not None, "the places of a captured forward are not known to the host"
        blocks, begin = [], 0
        for count in self._experts:
            for start, length in self.intervals:
                blocks.append(QueryBlock(begin, count, start, length))
                begin += count
        return tuple(blocks)

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks for a kernel: query starts [blocks + 1], K/V starts [blocks + 1] and lengths [blocks], int32."""
        # int32, as FlashAttention takes it.
        index = torch.arange(self.count + 1, dtype=torch.int32, device=self.starts.device)
        queries, begin = [], 0
        for count in self._experts:
            queries.append(begin + index[:-1] * count)
            begin += self.count * count
        queries.append(torch.full_like(index[:1], begin))
        experts = len(self._experts)
        # Kernels take one start more than there are blocks, as for packed K/V; `lengths` say what is read.
        end = self.starts[-1:] + self.lengths[-1:]
        # Both experts of a row see the same K/V.
        starts = torch.cat((*[self.starts] * experts, end)).int()
        return torch.cat(queries), starts, self.lengths.repeat(experts).int()

    @property
    def _experts(self) -> tuple[int, ...]:
        """Tokens a row of each expert that has any."""
        return tuple(count for count in (self.und, self.gen) if count)


def upload(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list or tensor of the host as a tensor on the device, without waiting for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
