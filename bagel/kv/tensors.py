"""A segment's bytes as a tensor. torch is loaded when one is asked for, by the engines that have it already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagel.kv.pages import KvLayout

if TYPE_CHECKING:
    from torch import Tensor


def segment_tensor(layout: KvLayout, memory: memoryview, length: int) -> Tensor:
    """A segment's memory as [layers, 2, length, kv_heads, head_dim], without a copy."""
    import torch

    flat = torch.frombuffer(memory, dtype=getattr(torch, layout.dtype))
    return flat.view(layout.layers, 2, length, layout.kv_heads, layout.head_dim)
