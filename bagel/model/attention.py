"""One attention for everything: queries of several rows against K/V that lie in one slab.

A slab holds the K/V of all rows of a forward, each row's in an interval of its own, so that a context is
written once and every later forward adds only its own tokens. A row is one context being extended: a text
segment, an image block, one decoded token, or one branch of a picture being denoised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from bagel.checkpoint.config import LlmConfig
from bagel.model.kernels import Rope


class KvSlab:
    """K and V of all layers, k and v each [layers, tokens, kv_heads, head_dim]."""

    def __init__(self, config: LlmConfig, tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, tokens, config.num_key_value_heads, config.head_dim)
        # Zeros, as some attention reads rows that are not written yet (LayerBackend.read_ahead).
        self.k, self.v = _zeros(shape, dtype, device), _zeros(shape, dtype, device)

    def clear(self, start: int, tokens: int) -> None:
        """Make zeros of the tokens from start on, in all layers."""
        self.k[:, start : start + tokens].zero_()
        self.v[:, start : start + tokens].zero_()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [tokens, kv_heads, head_dim]."""
        return self.k[layer], self.v[layer]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU memory that is taken once it is written to: torch.zeros would write all of it at once."""
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class QueryBlock:
    """Queries begin to begin + count of a forward, which see `length` tokens of K/V from `start` on."""

    begin: int
    count: int
    start: int
    length: int


@dataclass(frozen=True)
class Rows:
    """Where the tokens of one forward lie, the same number of tokens in every row.

    starts, lengths: each row's interval of visible K/V in the slab, its own tokens included. They are known to
    the host (the loop over rows) and lie on the device (the kernel that takes lengths there).
    und, gen: tokens a row of each expert; slots [rows * und] and [rows * gen] are their places in the slab.
    rope: rotary factors (MoTDecoder.rope), [rows, und or 1, 1, head_dim] and [rows, gen or 1, 1, head_dim], float32.
    extents: `on_device`, where it changes under a captured forward; starts and lengths are then bounds.
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
    extents: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def queries(self) -> int:
        """All queries of the forward."""
        return len(self.starts) * (self.und + self.gen)

    @cached_property
    def blocks(self) -> tuple[QueryBlock, ...]:
        """What attends to what: all rows' und queries, row after row, then their gen queries.

        Each expert's queries lie together, as each makes its own. Without a causal order it makes no difference that a
        row's two experts attend apart.
        """
        experts = [count for count in (self.und, self.gen) if count]
        blocks, begin = [], 0
        for count in experts:
            for start, length in zip(self.starts, self.lengths, strict=True):
                blocks.append(QueryBlock(begin, count, start, length))
                begin += count
        return tuple(blocks)

    @cached_property
    def max_queries(self) -> int:
        return max(self.und, self.gen)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query starts [blocks + 1], K/V starts [blocks + 1] and lengths [blocks], int32."""
        if self.extents is not None:
            return self.extents
        device = self.und_slots.device
        queries = (*(block.begin for block in self.blocks), self.queries)
        starts = (*(block.start for block in self.blocks), self.starts[-1] + self.lengths[-1])
        lengths = [block.length for block in self.blocks]
        return (
            upload(queries, torch.int32, device),
            upload(starts, torch.int32, device),
            upload(lengths, torch.int32, device),
        )


def upload(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small host list or tensor as a device tensor, without waiting for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
