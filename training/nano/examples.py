"""The examples that tasks make: texts and scenes, and what a picture must show to be right."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from training.nano.world import Item, Scene

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One sequence. The model reads `texts` and `source`, and learns to write `answer` and to draw `target`.

    what: the kind of task; vae, vit: how the source enters; wanted: what the picture must show.
    """

    what: str
    texts: tuple[str, ...]
    answer: str | None = None
    source: Scene | None = None
    target: Scene | None = None
    vae: bool = False
    vit: bool = False
    wanted: Wanted | None = None


@dataclass(frozen=True)
class Thing:
    """An object that a text asks for; None where the text leaves it open."""

    shape: str
    colour: str
    size: str | None = None
    cell: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What a picture must show: exactly these objects, in the relations (index, left/right/above/below, index)."""

    things: tuple[Thing, ...]
    background: str | None = None
    relations: tuple[tuple[int, str, int], ...] = field(default=())


def things(items: tuple[Item, ...] | list[Item], *, size: bool, cell: bool) -> tuple[Thing, ...]:
    """Turn objects into things to ask for; size, cell: whether the text states them."""
    return tuple(
        Thing(item.shape, item.colour, item.size if size else None, item.cell if cell else None) for item in items
    )


def pick(rng: Random, weighted: tuple[tuple[T, float], ...]) -> T:
    """Choose one of several by their weights."""
    chance = rng.random() * sum(weight for _, weight in weighted)
    for each, weight in weighted:
        chance -= weight
        if chance < 0:
            return each
    return weighted[-1][0]  # rounding may leave a remainder
