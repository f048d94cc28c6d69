"""The world of bagel-nano: flat coloured shapes on a plain background. Pure Python, so that workers are quick.

Lengths are pixels of a 128 x 128 picture, with x to the right and y down. Every object lies well inside one cell of a
3 x 3 grid, no two objects touch, and sizes and colours differ clearly, so that the pixels determine the scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

SIDE = 128
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart")
COLOURS = {
    "red": (220, 38, 38),
    "orange": (249, 128, 20),
    "yellow": (250, 214, 30),
    "green": (34, 160, 70),
    "cyan": (40, 200, 215),
    "blue": (37, 85, 225),
    "purple": (135, 50, 180),
    "pink": (250, 140, 195),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "beige": (235, 222, 190),
    "navy": (20, 26, 90),
}
SIZES = {"small": (11, 12, 13), "large": (20, 21, 22)}
"""The possible radii (half the longest side) for each name of a size."""
CELLS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
CORNERS = (0, 2, 6, 8)
CENTRE = 4
# Lines, a triangle on its base or its tip, a square, and a square on its tip.
SPREADS = {
    2: ((3, 5), (1, 7), (0, 8), (2, 6)),
    3: ((3, 4, 5), (1, 4, 7), (1, 6, 8), (0, 2, 7)),
    4: ((0, 2, 6, 8), (1, 3, 5, 7)),
}
"""The cells of objects whose places the text leaves open, by their number, in the order of the text."""
# A centre lies in the first third up to LOW, in the last one from HIGH on, in the middle one within MIDDLE.
LOW, HIGH = 36, 92
MIDDLE = (54, 74)
GAP, MARGIN = 6, 3


@dataclass(frozen=True)
class Item:
    """One object: its look, its radius (half the longest side), its cell (row * 3 + column) and its centre."""

    shape: str
    colour: str
    size: str
    radius: int
    cell: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A background, and objects in the reading order of their cells."""

    items: tuple[Item, ...]
    background: str = "white"


@dataclass(frozen=True)
class Look:
    """An object without a place."""

    shape: str
    colour: str
    size: str

    @property
    def name(self) -> tuple[str, str]:
        return self.colour, self.shape


def look(rng: Random) -> Look:
    """A random look."""
    return Look(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES)))


def distinct_looks(rng: Random, count: int) -> list[Look]:
    """Random looks, no two with the same colour and shape, so that a text can tell them apart."""
    looks: list[Look] = []
    while len(looks) < count:
        new = look(rng)
        if all(new.name != other.name for other in looks):
            looks.append(new)
    return looks


def place(rng: Random, thing: Look, cell: int) -> Item:
    """Place an object at random within a cell."""
    radius = rng.choice(SIZES[thing.size])
    row, column = divmod(cell, 3)
    return Item(
        thing.shape,
        thing.colour,
        thing.size,
        radius,
        cell,
        _coordinate(rng, column, radius),
        _coordinate(rng, row, radius),
    )


def _coordinate(rng: Random, third: int, radius: int) -> int:
    if third == 1:
        return rng.randint(*MIDDLE)
    near = rng.randint(radius + MARGIN, LOW)
    return near if third == 0 else SIDE - near


def apart(one: Item, other: Item) -> bool:
    """Whether two objects keep a gap between them."""
    reach = one.radius + other.radius + GAP
    return abs(one.x - other.x) >= reach or abs(one.y - other.y) >= reach


def fits(item: Item, others: Sequence[Item]) -> bool:
    """Whether an object keeps a gap to all others."""
    return all(apart(item, other) for other in others)


def arrange(rng: Random, looks: Sequence[Look], cells: Sequence[int] | None = None) -> list[Item] | None:
    """Place objects without overlap at the given cells, or at random ones; None if they do not fit."""
    for attempt in range(30 if cells is None else 12):
        # The corners are the farthest apart, so they come last, when other cells were too tight.
        pool: Sequence[int] = CORNERS if attempt >= 20 else range(9)
        chosen = cells if cells is not None else rng.sample(pool, len(looks))
        items = [place(rng, thing, cell) for thing, cell in zip(looks, chosen, strict=True)]
        if all(fits(item, items[:i]) for i, item in enumerate(items)):
            return items
    return None


def scene(rng: Random, looks: Sequence[Look], background: str, cells: Sequence[int] | None = None) -> Scene | None:
    """A scene with these objects; None if they do not fit into these cells."""
    items = arrange(rng, looks, cells)
    return None if items is None else make_scene(items, background)


def spread(rng: Random, looks: Sequence[Look]) -> list[Item]:
    """Place objects whose places the text leaves open, in the order of the text."""
    while True:
        items = arrange(rng, looks, rng.choice(SPREADS[len(looks)]))
        if items is not None:
            return items


def make_scene(items: Sequence[Item], background: str) -> Scene:
    """A scene with its objects in reading order."""
    return Scene(tuple(sorted(items, key=lambda item: item.cell)), background)


def random_scene(rng: Random, counts: Sequence[int] = (1, 2, 3)) -> Scene:
    """A scene of distinct objects at random places."""
    while True:
        made = scene(rng, distinct_looks(rng, rng.choice(counts)), random_background(rng))
        if made is not None:
            return made


def counted_scene(rng: Random, count: int, background: str, thing: Look | None = None) -> Scene:
    """A scene with the same object several times."""
    thing = thing or look(rng)
    while True:
        made = scene(rng, [thing] * count, background)
        if made is not None:
            return made


def random_background(rng: Random) -> str:
    """A random background, white more often than others."""
    return "white" if rng.random() < 0.3 else rng.choice(tuple(BACKGROUNDS))


def with_item(world: Scene, old: Item, new: Item | None) -> Scene:
    """The scene with one object replaced, or removed if `new` is None."""
    items = [item for item in world.items if item is not old]
    return make_scene(items if new is None else [*items, new], world.background)


def recoloured(item: Item, colour: str) -> Item:
    """The same object in another colour."""
    return replace(item, colour=colour)
