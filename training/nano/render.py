"""Draw scenes in batches on any device, with sprites whose edges are anti-aliased."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.nano.world import BACKGROUNDS, COLOURS, MAX_OBJECTS, SHAPES, SIDE, SIZES, Scene

SPRITE = 48
"""Side of a sprite in pixels; its centre is at SPRITE / 2."""
SAMPLES = 8
RADII = tuple(radius for radii in SIZES.values() for radius in radii)
FIELDS = 5
"""Integers per object: the indices of shape (-1: no object), colour and radius, then x and y."""


def encode_scenes(scenes: Sequence[Scene]) -> Tensor:
    """Encode scenes -> [n, 1 + MAX_OBJECTS * FIELDS] int16: the background, then the objects."""
    names, colours, backgrounds = SHAPES, list(COLOURS), list(BACKGROUNDS)
    rows = []
    for each in scenes:
        row = [backgrounds.index(each.background)]
        for item in each.items:
            row += [names.index(item.shape), colours.index(item.colour), RADII.index(item.radius), item.x, item.y]
        row += [-1, 0, 0, 0, 0] * (MAX_OBJECTS - len(each.items))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int16)


class Renderer:
    """Draws encoded scenes."""

    def __init__(self, device: torch.device | str) -> None:
        sprites = [[_sprite(shape, radius) for radius in RADII] for shape in SHAPES]
        self.sprites = torch.stack([torch.stack(row) for row in sprites]).to(device)
        self.colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 127.5 - 1
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device) / 127.5 - 1

    def __call__(self, codes: Tensor, palette: Tensor | None = None) -> Tensor:
        """codes [n, ...] of encode_scenes -> pixels [n, 3, SIDE, SIDE] in [-1, 1], rounded to steps of 8 bits.

        palette: other colours to use, [n, 1 + MAX_OBJECTS, 3] in [-1, 1], the background's first.
        """
        codes = codes.to(self.sprites.device).long()
        objects = codes[:, 1:].view(len(codes), MAX_OBJECTS, FIELDS)
        background = self.backgrounds[codes[:, 0]] if palette is None else palette[:, 0]
        pixels = background[:, :, None, None].expand(-1, -1, SIDE, SIDE)
        line = torch.arange(SIDE, device=codes.device)
        for i in range(MAX_OBJECTS):
            shape, colour, radius, x, y = objects[:, i].unbind(1)
            rows = line - y[:, None] + SPRITE // 2
            columns = line - x[:, None] + SPRITE // 2
            inside = _within(rows)[:, :, None] & _within(columns)[:, None, :] & (shape >= 0)[:, None, None]
            rows, columns = rows.clamp(0, SPRITE - 1), columns.clamp(0, SPRITE - 1)
            flat = ((shape.clamp(min=0) * len(RADII) + radius) * SPRITE)[:, None] + rows
            alpha = self.sprites.view(-1)[flat[:, :, None] * SPRITE + columns[:, None, :]] * inside
            paint = self.colours[colour] if palette is None else palette[:, 1 + i]
            pixels = torch.lerp(pixels, paint[:, :, None, None].expand_as(pixels), alpha[:, None])
        return (pixels.add(1).mul(127.5).round() / 127.5) - 1


def _within(index: Tensor) -> Tensor:
    return (index >= 0) & (index < SPRITE)


def _sprite(shape: str, radius: int) -> Tensor:
    """Coverage [SPRITE, SPRITE] of a shape, from SAMPLES x SAMPLES points per pixel."""
    count = SPRITE * SAMPLES
    points = (torch.arange(count) + 0.5) / SAMPLES - SPRITE / 2
    y, x = torch.meshgrid(points / radius, points / radius, indexing="ij")
    return _INSIDE[shape](x, y).float().view(SPRITE, SAMPLES, SPRITE, SAMPLES).mean((1, 3))


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + y.square() <= 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) <= 0.94


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return (y <= 0.87) & (x.abs() <= (y + 0.87) / 1.74)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """A star with five points."""
    # The angle is folded to one half of one point, which leaves a single straight edge to test.
    angle = torch.atan2(x, -y).abs()
    folded = torch.remainder(angle + math.pi / 5, 2 * math.pi / 5).sub(math.pi / 5).abs()
    r, inner = (x.square() + y.square()).sqrt(), 0.42
    px, py = r * folded.sin(), r * folded.cos()
    ix, iy = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5)
    return (py - 1.04) * ix - px * (iy - 1.04) <= 0


def _cross(x: Tensor, y: Tensor) -> Tensor:
    small, large = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return (small <= 0.34) & (large <= 1)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return x.abs() + y.abs() <= 1


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A heart: two half discs above a point."""
    ax = x.abs()
    lobes = (ax - 0.5).square() + (y + 0.4).square() <= 0.25
    body = (y >= -0.4) & (ax <= (0.92 - y) / 1.32)
    return lobes | body


_INSIDE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
}
