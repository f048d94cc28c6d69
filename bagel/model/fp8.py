"""FP8: weights in e4m3 with one scale an output, inputs with one scale a token, products summed in float32.

A row's scale maps its largest magnitude to e4m3's largest number, so outliers of one token or output cost no other
digits. On a GPU `torch._scaled_mm` multiplies; elsewhere the same arithmetic runs in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bagel.errors import ConfigError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST = 1e-12
"""The least magnitude that a row is scaled by, so that a row of zeros stays one."""
MULTIPLE = 16
"""Inputs and outputs of a product are multiples of this: the hardware reads 16 bytes at once."""
FAST_ACCUMULATION_ROWS = 1024
"""Tokens from which on tensor cores may keep their sums in fewer digits than float32 has: quicker, less exact
(bench/README.md). Of fewer nothing is gained, and some products do not exist."""
AT_ONCE = 2048
"""Rows of a weight that are quantised together: their float32 copies are all the memory that it takes."""
_LEAST_CAPABILITY = (8, 9)


class Scaled(NamedTuple):
    """Rows in e4m3: values [..., n] times scales [..., 1] float32."""

    values: Tensor
    scales: Tensor


def quantise(x: Tensor) -> Scaled:
    """Each row of x [..., n] rounded to e4m3, with a scale of its own. Rows that are not finite stay so."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return Scaled((x * (LARGEST / largest)).to(FP8), largest / LARGEST)


def quantise_into(values: Tensor, target: Tensor, scale: Tensor, device: torch.device | str) -> None:
    """Quantise the rows of values [rows, n] into target [rows, n] and scale [rows, 1], which may lie anywhere.

    device: computes, at best the model's, which is faster than the host.
    """
    for begin in range(0, len(target), AT_ONCE):
        rows = slice(begin, begin + AT_ONCE)
        quantised = quantise(values[rows].to(device))
        target[rows].copy_(quantised.values)
        scale[rows].copy_(quantised.scales)


def scaled_product(x: Scaled, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs] in e4m3, bfloat16; scale [outputs, 1] float32: the weight's."""
    values, scales = x.values.flatten(0, -2), x.scales.view(-1, 1)
    if values.is_cuda:
        product = torch._scaled_mm(
            values,
            weight.t(),
            scale_a=scales,
            scale_b=scale.view(1, -1),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=len(values) >= FAST_ACCUMULATION_ROWS,
        )
    else:
        # e4m3 fits float32, and a product of two fits too: only the order of the sum differs from the GPU's.
        product = (values.float() @ weight.float().t()) * scales * scale.view(1, -1)
        product = (product if bias is None else product + bias).bfloat16()
    return product.view(*x.values.shape[:-1], len(weight))


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError, with what to do instead, where FP8 cannot run."""
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"quantization fp8 computes in bfloat16, not in {name}; choose --dtype bfloat16")
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, each)) for each in (capability, _LEAST_CAPABILITY))
        raise ConfigError(
            f"quantization fp8 needs a GPU of compute capability {least}, like an L4 or H100; {device} has {found}; "
            "leave it out"
        )
