"""Determine what a picture shows from its pixels alone: connected components, their colours and their shapes.

To stay independent it shares nothing with the renderer but the names and RGB values of colours. It recognises a shape
by how well a component, stretched to a square, covers each of a few outlines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from training.nano.examples import Thing, Wanted
from training.nano.world import BACKGROUNDS, CELLS, COLOURS

Mask = NDArray[np.bool_]
OUTLINE = 48
LARGE = 33
"""An object whose longest side has at least this many pixels is large."""
# Distances in RGB: to a colour's name, to a background's name, and of an object's pixels from the background.
COLOUR_REACH, BACKGROUND_REACH, FOREGROUND = 60.0, 40.0, 70.0
SMALLEST = 60  # pixels; smaller components are noise of the autoencoder
THIRDS = (48, 80)
OVERLAP = 0.75
BLURS = (2.0, 3.0)  # on an outline of 48 pixels; that is half as much on a small object
SAME = 40  # steps of 255 that the autoencoder may move an untouched pixel


@dataclass(frozen=True)
class Found:
    """One object in a picture; its shape or colour is "?" if it is unknown. reach: half its longest side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    reach: float = 0.0

    @property
    def cell(self) -> int:
        """Its cell of the 3 x 3 grid."""
        column, row = (sum(v >= edge for edge in THIRDS) for v in (self.x, self.y))
        return row * 3 + column


@dataclass(frozen=True)
class Seen:
    """The content of a picture: its background ("?" if unknown) and its objects."""

    background: str
    objects: tuple[Found, ...]

    def __str__(self) -> str:
        objects = ", ".join(f"{o.size} {o.colour} {o.shape} {CELLS[o.cell]}" for o in self.objects)
        return f"{objects or 'nothing'} on {self.background}"


def read(picture: Image.Image) -> Seen:
    """Determine the content of a picture of 128 x 128 pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    foreground: Mask = np.abs(pixels - ground).max(axis=-1) > FOREGROUND / 2
    labels, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        component: Mask = labels[window] == index
        if component.sum() >= SMALLEST:
            found.append(_object(component, pixels[window], window, ground))
        elif component.sum() >= SMALLEST // 4:
            found.append(Found("?", "?", "small", 0.0, 0.0))
    return Seen(_nearest(ground, BACKGROUNDS, BACKGROUND_REACH), tuple(found))


def _object(
    component: Mask, pixels: NDArray[np.float32], window: tuple[slice, slice], ground: NDArray[np.float32]
) -> Found:
    inner: Mask = ndimage.binary_erosion(component, iterations=2)
    inside = pixels[inner if inner.sum() >= 12 else component]
    colour = np.median(inside, axis=0)
    even = float((np.abs(inside - colour).max(axis=1) < COLOUR_REACH).mean())
    name = _nearest(colour, COLOURS, COLOUR_REACH) if even > 0.9 else "?"
    # Up to the middle of a soft edge: what only differs from the ground makes a shape rounder than it looks.
    solid: Mask = component & (np.linalg.norm(pixels - colour, axis=-1) < np.linalg.norm(pixels - ground, axis=-1))
    rows, columns = (np.flatnonzero(solid.any(axis=axis)) for axis in (1, 0))
    (top, bottom), (left, right) = ((int(each[0]), int(each[-1])) for each in (rows, columns))
    side = max(bottom - top, right - left) + 1
    shape = _shape(solid[top : bottom + 1, left : right + 1])
    x, y = window[1].start + (left + right) / 2, window[0].start + (top + bottom) / 2
    return Found(shape, name, "large" if side >= LARGE else "small", x, y, side / 2)


def _nearest(colour: NDArray[np.float32], names: dict[str, tuple[int, int, int]], reach: float) -> str:
    distance = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in names.items()}
    best = min(distance, key=lambda name: distance[name])
    return best if distance[best] <= reach else "?"


def _shape(component: Mask) -> str:
    """The shape whose outline overlaps most (intersection over union); "?" if none overlaps enough."""
    height, width = component.shape
    if max(height, width) > 1.35 * min(height, width):
        return "?"
    stretched = _stretched(component)
    overlap = {
        name: max(float((stretched & each).sum() / (stretched | each).sum()) for each in outlines)
        for name, outlines in OUTLINES.items()
    }
    best = max(overlap, key=lambda name: overlap[name])
    return best if overlap[best] >= OVERLAP else "?"


def _stretched(mask: Mask) -> Mask:
    """Stretch a mask to the square of the outlines."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((OUTLINE, OUTLINE), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127


def _softened(outline: Mask, blur: float) -> Mask:
    """Blur an outline and keep what stays above half."""
    # The autoencoder's soft edges lose the tips of stars and hearts in the same way.
    soft: Mask = ndimage.gaussian_filter(np.pad(outline, OUTLINE // 4).astype(np.float32), blur) > 0.5
    (rows, columns) = ndimage.find_objects(soft.astype(np.int8))[0]
    return _stretched(soft[rows, columns])


def _outlines() -> dict[str, Mask]:
    u, v = np.meshgrid(np.linspace(-1, 1, OUTLINE), np.linspace(-1, 1, OUTLINE))
    star = [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate([1.0, 0.44] * 5)]
    turn = np.linspace(0, 2 * math.pi, 200)
    heart = list(
        zip(
            (16 * np.sin(turn) ** 3).tolist(),
            (-13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)).tolist(),
            strict=True,
        )
    )
    return {
        "circle": u**2 + v**2 <= 1,
        "square": np.ones_like(u, dtype=bool),
        "triangle": np.abs(u) <= (v + 1) / 2,
        "diamond": np.abs(u) + np.abs(v) <= 1,
        "cross": np.minimum(np.abs(u), np.abs(v)) <= 0.34,
        "star": _polygon(star),
        "heart": _polygon(heart),
    }


def _polygon(points: Sequence[tuple[float, float]]) -> Mask:
    """Draw a polygon, stretched to the square."""
    array = np.array(points)
    low, high = array.min(axis=0), array.max(axis=0)
    scaled = (array - low) / (high - low) * (OUTLINE - 1)
    image = Image.new("L", (OUTLINE, OUTLINE))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in scaled], fill=255)
    return np.asarray(image) > 127


OUTLINES = {
    name: tuple(_softened(outline, blur) if blur else outline for blur in BLURS)
    for name, outline in _outlines().items()
}


def satisfies(seen: Seen, wanted: Wanted) -> bool:
    """Whether a picture shows exactly what was wanted, for some assignment of its objects."""
    if wanted.background is not None and seen.background != wanted.background:
        return False
    if len(seen.objects) != len(wanted.things):
        return False
    return any(
        all(_is(found, thing) for found, thing in zip(order, wanted.things, strict=True))
        and all(_related(order[a], kind, order[b]) for a, kind, b in wanted.relations)
        for order in permutations(seen.objects)
    )


def _is(found: Found, thing: Thing) -> bool:
    return (
        found.shape == thing.shape
        and found.colour == thing.colour
        and thing.size in (None, found.size)
        and thing.cell in (None, found.cell)
    )


def _related(a: Found, kind: str, b: Found) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[kind]
    return along > 8 and along > abs(across)  # clearly so, and more to that side than across


def unchanged(before: Image.Image, after: Image.Image, allowed: Mask) -> float:
    """The share of pixels outside `allowed` that an edit left unchanged, within SAME of 255 in every channel."""
    one, other = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (before, after))
    same = np.abs(one - other).max(axis=-1) <= SAME
    kept = ~allowed
    return float(same[kept].mean()) if kept.any() else 1.0
