"""The elementwise work of a decoder layer, as one set of functions that is chosen when a model is loaded.

`TORCH` uses PyTorch's own operators, on any device. `bagel.model.triton_kernels.TRITON` needs one launch each on a GPU.
Both compute in float32 and round once, so they agree up to the order of sums.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.model.fp8 import FP8, Scaled, quantise

Rope = tuple[Tensor, Tensor]
Activations = Tensor | Scaled
"""What a matrix product takes: a tensor, or rows in FP8 with their scales."""


class Kernels(Protocol):
    """The elementwise work of a layer. name: as the log calls this set.

    dtype: the weights' type of the product that takes a result; with float8_e4m3fn the result is Scaled.
    """

    name: str

    def cast(self, x: Tensor, dtype: torch.dtype) -> Activations:
        """x [..., n] rounded to dtype."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Activations:
        """RMS norm of x [..., hidden] float32, computed in float32 and rounded to dtype."""
        ...

    def add_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Activations]:
        """x + delta in float32 (a new tensor), and its RMS norm in dtype; x and delta [..., hidden]."""
        ...

    def rotate(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        eps: float,
        rope: Rope,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> None:
        """RMS norm of each head of q and k, rotary embedding, and all three written to where attention reads them.

        qkv [rows, n, (heads + 2 kv_heads) * head_dim] contiguous; norms: weights of q's and k's norm [head_dim];
        rope: rotary factors, each [rows, n or 1, 1, head_dim] float32. Written: q [rows * n, heads, head_dim], and the
        places slots [rows * n] of kv = (k, v), each [tokens, kv_heads, head_dim]. q may have no heads, or k and v none.
        """
        ...

    def gate(self, gate_up: Tensor, dtype: torch.dtype) -> Activations:
        """silu(gate) * up of [..., 2 * intermediate], rounded to dtype, which is gate_up's or float8_e4m3fn."""
        ...


class TorchKernels:
    """PyTorch's own operators."""

    name = "torch"

    def cast(self, x: Tensor, dtype: torch.dtype) -> Activations:
        """As Kernels.cast."""
        return quantise(x) if dtype is FP8 else x.to(dtype)

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Activations:
        """As Kernels.norm."""
        return self.cast(rms_norm(x, weight, eps), dtype)

    def add_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Activations]:
        """As Kernels.add_norm."""
        added = x + delta
        return added, self.cast(rms_norm(added, weight, eps), dtype)

    def rotate(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        eps: float,
        rope: Rope,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> None:
        """As Kernels.rotate."""
        (heads, dim), kv_heads = q.shape[-2:], kv[0].shape[-2]
        qk, v = qkv.unflatten(-1, (-1, dim)).split((heads + kv_heads, kv_heads), dim=-2)
        # q and k are normed and turned alike, so one pass does both.
        weight = torch.cat((norms[0].expand(heads, -1), norms[1].expand(kv_heads, -1)))
        turned_q, turned_k = norm_and_rotate(qk.float(), weight, eps, rope).split((heads, kv_heads), dim=-2)
        q.view(turned_q.shape).copy_(turned_q)
        for cache, new in zip(kv, (turned_k, v), strict=True) if kv_heads else ():
            # By index, as a row's tokens do not lie together: latents lie between two delimiters.
            cache.index_copy_(0, slots, new.flatten(0, -3).to(cache.dtype))

    def gate(self, gate_up: Tensor, dtype: torch.dtype) -> Activations:
        """As Kernels.gate."""
        # Rounded once, from float32, where a product in FP8 takes it.
        gate, up = (gate_up.float() if dtype is FP8 else gate_up).chunk(2, dim=-1)
        return self.cast(F.silu(gate).mul_(up), dtype)


TORCH = TorchKernels()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, of float32 and in float32."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    # On a CPU rms_norm is five passes over x; this is three.
    normed: Tensor = (x * rms_scale(x, eps)).mul_(weight)
    return normed


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays as 1."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_and_rotate(x: Tensor, weight: Tensor, eps: float, factors: Rope) -> Tensor:
    """RMS norm per head, then rotary embedding, in float32: x [..., heads, head_dim], weight [heads, head_dim].

    factors: see rope_factors. The norm's weight goes into them and its scale comes last, which commutes.
    """
    half = x.shape[-1] // 2
    direct, swapped = factors
    y = (x * (direct * weight)).addcmul_(x.roll(half, -1), swapped * weight.roll(half, -1))
    return y.mul_(rms_scale(x, eps))


def rope_factors(cos: Tensor, sin: Tensor) -> Rope:
    """cos and sin [..., head_dim] -> factors of x and of x with its halves swapped: x cos + swap(x) (-sin | sin)."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)
