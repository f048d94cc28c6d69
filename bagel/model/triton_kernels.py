"""A layer's elementwise work on a GPU: each function of `Kernels` is one launch and one pass over memory.

Needs Triton, which PyTorch's CUDA builds bring. bench/README.md has a row for what each gains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagel.model.fp8 import FP8, LARGEST, SMALLEST, Scaled
from bagel.model.kernels import Activations, Rope

_GATE_BLOCK = 1024
_GATE_LOOP = 4096
_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)


class TritonKernels:
    """One launch for each function."""

    name = "triton"

    def cast(self, x: Tensor, dtype: torch.dtype) -> Activations:
        """As Kernels.cast."""
        if dtype is not FP8:
            return x.to(dtype)
        x = x.contiguous()
        out = _new_scaled(x.shape, x)
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        _quantise[x.numel() // width,](x, *out, width, block, num_warps=_warps(block))
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Activations:
        """As Kernels.norm."""
        x = x.contiguous()
        return self._norm(x, x, x, weight, eps, dtype, add=False)

    def add_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Activations]:
        """As Kernels.add_norm."""
        x, delta = x.contiguous(), delta.contiguous()
        added = torch.empty_like(x)
        return added, self._norm(x, delta, added, weight, eps, dtype, add=True)

    def _norm(
        self, x: Tensor, delta: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add: bool
    ) -> Activations:
        scaled = _new_scaled(x.shape, x) if dtype is FP8 else None
        normed = torch.empty(x.shape, dtype=dtype, device=x.device) if scaled is None else scaled.values
        # Without scales the kernel writes none, and any pointer does.
        scales = x if scaled is None else scaled.scales
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        rows, scale = x.numel() // width, scaled is not None
        _norm[rows,](x, delta, added, weight, normed, scales, eps, width, block, add, scale, num_warps=_warps(block))
        return normed if scaled is None else scaled

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
        rows, n = qkv.shape[:2]
        (heads, dim), kv_heads = q.shape[-2:], kv[0].shape[-2]
        direct, swapped = rope
        turned, copied = (triton.next_power_of_2(count) for count in (heads + kv_heads, max(1, kv_heads)))
        _rotate[rows * n,](
            qkv,
            *norms,
            eps,
            direct,
            swapped,
            direct.stride(0),
            # Where a row has one position for all tokens, stride 0 reads the same factors for each.
            direct.stride(1) if direct.shape[1] > 1 else 0,
            n,
            q,
            *kv,
            slots,
            heads,
            kv_heads,
            dim,
            turned,
            copied,
            triton.next_power_of_2(dim // 2),
            num_warps=_warps(turned * dim // 2),
        )

    def gate(self, gate_up: Tensor, dtype: torch.dtype) -> Activations:
        """As Kernels.gate."""
        width = gate_up.shape[-1] // 2
        shape = (*gate_up.shape[:-1], width)
        if dtype is FP8:
            scaled = _new_scaled(shape, gate_up)
            _gate_scaled[scaled.scales.numel(),](gate_up, *scaled, width, _GATE_LOOP, num_warps=_warps(_GATE_LOOP))
            return scaled
        out = gate_up.new_empty(shape)
        _gate[out.numel() // width, triton.cdiv(width, _GATE_BLOCK)](gate_up, out, width, _GATE_BLOCK)
        return out

    def try_out(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile and run one kernel; raises what Triton raises where it cannot."""
        self.gate(torch.zeros(1, 32, dtype=dtype, device=device), dtype)
        # Errors of a launch show only when the host waits for it.
        torch.cuda.synchronize(device)


TRITON = TritonKernels()


def _new_scaled(shape: Sequence[int], like: Tensor) -> Scaled:
    """Rows in FP8 that a kernel fills, on the device of `like`."""
    return Scaled(
        torch.empty(shape, dtype=FP8, device=like.device),
        torch.empty((*shape[:-1], 1), dtype=torch.float32, device=like.device),
    )


def _warps(elements: int) -> int:
    """Warps of a program over this many elements, so that each thread has 16."""
    return min(max(elements // 512, 1), 16)


@triton.jit
def _norm(
    x, delta, added, weight, normed, scales, eps, width, BLOCK: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr
):
    """One token: normed = rms_norm(x [+ delta]) * weight; with ADD the sum is kept in `added`, with SCALE in FP8."""
    # int64, as offsets of many long rows exceed int32.
    token = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    there = column < width
    # Before the sum that it need not wait for.
    factor = tl.load(weight + column, there, 0.0).to(tl.float32)
    value = tl.load(x + token + column, there, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + token + column, there, 0.0).to(tl.float32)
        tl.store(added + token + column, value, there)
    scale = tl.rsqrt(tl.sum(value * value) / width + eps)
    value = value * scale * factor
    if SCALE:
        largest = tl.maximum(tl.max(tl.abs(value)), _SMALLEST)
        tl.store(scales + tl.program_id(0), largest / _LARGEST)
        value = value * (_LARGEST / largest)
    tl.store(normed + token + column, value.to(normed.dtype.element_ty), there)


@triton.jit
def _rotate(
    qkv,
    q_norm,
    k_norm,
    eps,
    direct,
    swapped,
    rope_row,
    rope_token,
    n,
    q,
    k,
    v,
    slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    COPIED: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token: all heads of q and k normed and turned; q to its row, k and v to their place in the slab."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    source = qkv + token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM)
    factor = (token // n).to(tl.int64) * rope_row + (token % n) * rope_token
    # A head's two halves, each loaded once: a value of one is turned with its partner in the other.
    head, d = tl.arange(0, TURNED)[:, None], tl.arange(0, HALF)[None, :]
    here, of_q = d < DIM // 2, head < HEADS
    far = d + DIM // 2
    inside = (head < HEADS + KV_HEADS) & here
    low = tl.load(source + head * DIM + d, inside, 0.0).to(tl.float32)
    high = tl.load(source + head * DIM + far, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
    # Each has its own weight, as the norm comes before the rotation.
    low *= tl.where(of_q, tl.load(q_norm + d, here, 0.0), tl.load(k_norm + d, here, 0.0))
    high *= tl.where(of_q, tl.load(q_norm + far, here, 0.0), tl.load(k_norm + far, here, 0.0))
    # Both have one scale, so it may come last.
    turned = low * tl.load(direct + factor + d, here, 0.0) + high * tl.load(swapped + factor + d, here, 0.0)
    turned_far = high * tl.load(direct + factor + far, here, 0.0) + low * tl.load(swapped + factor + far, here, 0.0)
    turned *= scale
    turned_far *= scale
    at_q = q + token.to(tl.int64) * (HEADS * DIM) + head * DIM + d
    tl.store(at_q, turned.to(q.dtype.element_ty), inside & of_q)
    tl.store(at_q + DIM // 2, turned_far.to(q.dtype.element_ty), inside & of_q)
    at_k = k + slot * (KV_HEADS * DIM) + (head - HEADS) * DIM + d
    tl.store(at_k, turned.to(k.dtype.element_ty), inside & (head >= HEADS))
    tl.store(at_k + DIM // 2, turned_far.to(k.dtype.element_ty), inside & (head >= HEADS))
    # v is copied as it is: only q and k are normed and turned.
    head, d = tl.arange(0, COPIED)[:, None], tl.arange(0, 2 * HALF)[None, :]
    inside = (head < KV_HEADS) & (d < DIM)
    values = tl.load(source + (HEADS + KV_HEADS + head) * DIM + d, inside, 0.0)
    tl.store(v + slot * (KV_HEADS * DIM) + head * DIM + d, values, inside)


@triton.jit
def _gate(gate_up, out, width, BLOCK: tl.constexpr):
    """A block of one token: silu(gate) * up."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(gate_up + token * 2 * width + column, there, 0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + column, there, 0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + token * width + column, value.to(out.dtype.element_ty), there)


@triton.jit
def _gate_scaled(gate_up, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One token: silu(gate) * up in FP8. Computed twice, as it does not fit into registers; the caches hold it."""
    token = tl.program_id(0).to(tl.int64)
    source = gate_up + token * 2 * WIDTH
    most = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        there = column < WIDTH
        gate = tl.load(source + column, there, 0.0).to(tl.float32)
        up = tl.load(source + WIDTH + column, there, 0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(gate * tl.sigmoid(gate) * up))
    largest = tl.maximum(tl.max(most), _SMALLEST)
    tl.store(scales + token, largest / _LARGEST)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        there = column < WIDTH
        gate = tl.load(source + column, there, 0.0).to(tl.float32)
        up = tl.load(source + WIDTH + column, there, 0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * (_LARGEST / largest)
        tl.store(out + token * WIDTH + column, value.to(out.dtype.element_ty), there)


@triton.jit
def _quantise(x, out, scales, width, BLOCK: tl.constexpr):
    """One token in FP8."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    value = tl.load(x + token * width + column, there, 0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value)), _SMALLEST)
    tl.store(scales + token, largest / _LARGEST)
    tl.store(out + token * width + column, (value * (_LARGEST / largest)).to(out.dtype.element_ty), there)
