"""What a task makes: a sequence of texts and scenes, and what a picture of it must show."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from training.nano.world import Item, Scene

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One sequence. texts come before `answer`, which is learned; source is read, target is drawn.

    vae, vit: how the source enters. what: the kind of task, of which there may be a row in the evaluation. wanted: what
    the picture must show.
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
    """An object asked for; None where anything goes."""

    shape: str
    colour: str
    size: str | None = None
    cell: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What a drawn picture must show: exactly these objects, and relations (index, left/right/above/below, index)."""

    things: tuple[Thing, ...]
    background: str | None = None
    relations: tuple[tuple[int, str, int], ...] = field(default=())


def things(items: tuple[Item, ...] | list[Item], *, size: bool, cell: bool) -> tuple[Thing, ...]:
    """Objects as they are asked for; size, cell: whether those are said."""
    return tuple(
        Thing(item.shape, item.colour, item.size if size else None, item.cell if cell else None) for item in items
    )


def pick(rng: Random, weighted: tuple[tuple[T, float], ...]) -> T:
    """One of several, by their weights."""
    chance = rng.random() * sum(weight for _, weight in weighted)
    for each, weight in weighted:
        chance -= weight
        if chance < 0:
            return each
    return weighted[-1][0]
