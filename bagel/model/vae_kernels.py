"""Group norm and SiLU of the autoencoder on a GPU: two passes over memory, where PyTorch's operators make six.

PyTorch's own group norm has a program a group, 32 of them, and so leaves most of a large GPU idle. bench/README.md has
what this gains. Needs Triton, which PyTorch's CUDA builds bring.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

_TILE = 4096
"""Values that a program loads at once."""
_TILES = 16
_BLOCK = 4096


class NormSilu(nn.GroupNorm):
    """silu(group_norm(x)) of x [images, channels, height, width], computed in float32 and rounded to x's type.

    The result's channels lie last in memory.
    """

    @classmethod
    def like(cls, norm: nn.GroupNorm) -> NormSilu:
        """With the parameters of an affine group norm."""
        made = cls(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        made.weight, made.bias = norm.weight, norm.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.contiguous(memory_format=torch.channels_last)
        images, channels, rows = *x.shape[:2], x.shape[2] * x.shape[3]
        width = triton.next_power_of_2(channels)
        tile = max(1, _TILE // width)
        parts = triton.cdiv(rows, tile * _TILES)
        moments = x.new_empty((2, images, parts, channels), dtype=torch.float32)
        _moments[parts, images](x, *moments, rows, channels, width, tile, _TILES, num_warps=4)
        factors = x.new_empty((2, images, channels), dtype=torch.float32)
        group = channels // self.num_groups
        _factors[self.num_groups, images](
            *moments, self.weight, *factors, self.eps, rows, parts, tile * _TILES,
            channels, group, triton.next_power_of_2(group), 128, num_warps=4,
        )  # fmt: skip
        out = torch.empty_like(x)
        per_image = rows * channels
        blocks = triton.cdiv(per_image, _BLOCK)
        _normalise[blocks, images](x, *factors, self.bias, out, per_image, channels, _BLOCK, num_warps=8)
        return out


def fuse(network: Any) -> None:
    """Let an encoder or decoder of diffusers' AutoencoderKL compute each group norm and the SiLU behind it as one."""
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1, module.norm2 = NormSilu.like(module.norm1), NormSilu.like(module.norm2)
            module.nonlinearity = nn.Identity()
    network.conv_norm_out, network.conv_act = NormSilu.like(network.conv_norm_out), nn.Identity()


# Moments are means and sums of squares about them, joined as Chan, Golub and LeVeque do ("Updating formulae and a
# pairwise algorithm for computing sample variances", 1979): sums of plain squares would cancel where a mean is large.


@triton.jit
def _moments(x, means, squares, rows, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """A part of the rows of an image: each channel's mean, and its sum of squares about that."""
    part, image = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)[None, :]
    source = x + image.to(tl.int64) * rows * C
    # Of every TILE-th row first, so that threads meet once, at the end.
    mean = tl.zeros([TILE, WIDTH], tl.float32)
    square = tl.zeros([TILE, WIDTH], tl.float32)
    begin = part * (TILE * TILES) + tl.arange(0, TILE)[:, None]
    for i in range(TILES):
        row = begin + i * TILE
        inside = (row < rows) & (c < C)
        away = tl.where(inside, tl.load(source + row.to(tl.int64) * C + c, inside, 0.0).to(tl.float32) - mean, 0.0)
        step = away / (i + 1)
        mean += step
        square += away * (away - step)
    number = tl.minimum(tl.maximum((rows - begin + TILE - 1) // TILE, 0), TILES).to(tl.float32)
    mean_here = tl.sum(mean * number, 0)[None, :] / tl.sum(number)
    away = mean - mean_here
    at = (image * tl.num_programs(0) + part) * C + c
    tl.store(means + at, mean_here, c < C)
    tl.store(squares + at, tl.sum(square + away * away * number, 0)[None, :], c < C)


@triton.jit(do_not_specialize=["rows"])  # a 1 would be no tensor
def _factors(
    means, squares, weight, centres, scales, eps, rows, parts, part_rows,
    C: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One group of an image: what is taken from its channels, and what they are then multiplied by."""
    group, image = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)[None, :]
    each = tl.arange(0, PARTS)[:, None]
    source = image.to(tl.int64) * parts * C + group * GROUP + c
    number = (rows * GROUP).to(tl.float64)
    total = tl.zeros([PARTS, WIDTH], tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + each
        inside = (part < parts) & (c < GROUP)
        count = tl.minimum(rows - part * part_rows, part_rows).to(tl.float32)
        total += tl.load(means + source + part * C, inside, 0.0) * count
    mean = (tl.sum(total) / number).to(tl.float32)
    total = tl.zeros([PARTS, WIDTH], tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + each
        inside = (part < parts) & (c < GROUP)
        count = tl.minimum(rows - part * part_rows, part_rows).to(tl.float32)
        away = tl.where(inside, tl.load(means + source + part * C, inside, 0.0) - mean, 0.0)
        total += tl.load(squares + source + part * C, inside, 0.0) + away * away * count
    scale = tl.rsqrt((tl.sum(total) / number).to(tl.float32) + eps)
    channel = group * GROUP + c
    tl.store(centres + image * C + channel, mean + tl.zeros([1, WIDTH], tl.float32), c < GROUP)
    tl.store(scales + image * C + channel, tl.load(weight + channel, c < GROUP, 0.0) * scale, c < GROUP)


@triton.jit
def _normalise(x, centres, scales, bias, out, count, C: tl.constexpr, BLOCK: tl.constexpr):
    """A block of an image: silu((x - centre) * scale + bias)."""
    image = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    c = (at % C).to(tl.int32)
    at += image.to(tl.int64) * count
    value = tl.load(x + at, there, 0.0).to(tl.float32) - tl.load(centres + image * C + c)
    value = value * tl.load(scales + image * C + c) + tl.load(bias + c)
    value = value * tl.sigmoid(value)
    tl.store(out + at, value.to(out.dtype.element_ty), there)
