"""The rows of the evaluation: how each makes its prompts and requests, and judges the results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from bagel.errors import ConfigError
from bagel.events import Result
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import Modality, Request, resolve
from training.nano import drawing, edits, questions
from training.nano.checker import Mask, Seen, read, satisfies, unchanged
from training.nano.examples import Example
from training.nano.images import to_pictures
from training.nano.phrases import NUMBERS, article, plural
from training.nano.render import Renderer, encode_scenes
from training.nano.world import COLOURS, SHAPES, Scene

OFF = {"cfg_text_scale": 1.0, "cfg_img_scale": 1.0}
EDGE = 4
"""Pixels around an edit that may change with it."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    goal: the share to reach, if there is one; options: settings of every request; prompts: another row whose prompts
    and seeds it takes, so that the two can be compared; extra: evaluated only if it is named.
    """

    name: str
    make: Callable[[Random], Example]
    goal: float | None = None
    think: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: str = ""
    extra: bool = False


@dataclass(frozen=True)
class Case:
    """One request, and the example that says what is right."""

    row: Row
    example: Example
    request: Request


def _only(make: Callable[[Random], Example], what: str) -> Callable[[Random], Example]:
    def again(rng: Random) -> Example:
        while True:
            example = make(rng)
            if example.what == what:
                return example

    return again


SIDES = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "underneath"),
}
GROUNDED = (
    "{bare}, {ground} bg",
    "{bare} {ground} background",
    "{bare} on {ground} bg pls",
    "please draw {body} on {ground} background.",
    "Could you please draw {body}? The background should be {ground}.",
    "I want to see {body} on {ground}",
    "Hi! Draw {body}, background {ground}, thanks",
    "pls make {bare} with a {ground} bg",
    "just {body}, background {ground}",
)
"""Ways to ask with a background. Training has only the first one; keep the others out of its phrases."""
OPEN = (
    "{bare}",
    "please draw {body}",
    "Would it be possible to get {body}?",
    "quick one: {bare}",
    "hi there! i was hoping for {body}",
)
"""Ways to ask that leave the background open."""


def person(rng: Random) -> Example:
    """A drawing, asked for as people do: without articles, with abbreviations, capitals or polite words."""
    example = rng.choice((drawing.one, drawing.two, drawing.count))(rng)
    wanted = example.wanted
    assert wanted is not None
    named = [f"{thing.size + ' ' if thing.size else ''}{thing.colour} {thing.shape}" for thing in wanted.things]
    if example.what == "two":
        side = rng.choice(SIDES[wanted.relations[0][1]])
        body = f"{article(named[0])} {side} {article(named[1])}"
        bare = f"{named[0]} {side} {rng.choice((named[1], article(named[1])))}"
    elif example.what == "count":
        many = rng.choice((str(len(named)), NUMBERS[len(named)]))
        body = bare = f"{many} {plural(named[0])}"
    else:
        body, bare = article(named[0]), named[0]
    ground = wanted.background if rng.random() < 0.75 else None
    form = rng.choice(OPEN if ground is None else GROUNDED)
    text = _typed(rng, form.format(body=body, bare=bare, ground=ground))
    things = tuple(replace(thing, cell=None) for thing in wanted.things)  # these texts name no place
    return replace(example, what="person", texts=(text,), wanted=replace(wanted, things=things, background=ground))


def _typed(rng: Random, text: str) -> str:
    kind = rng.random()
    if kind < 0.2:
        return text.upper()
    if kind < 0.55:
        return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")
    return text


def _again(row: Row, name: str, **changes: Any) -> Row:
    """A row with the prompts and seeds of another."""
    return replace(row, name=f"{name}: {row.name}", goal=None, prompts=row.name, **changes)


ONE, TWO = Row("one object", drawing.one, 0.97), Row("two objects", drawing.two, 0.92)
COUNT, THREE = Row("count to four", drawing.count, 0.85), Row("three objects", _only(drawing.three, "three"), 0.80)
DESCRIBE = Row("description", _only(questions.see, "describe"), 0.90)
QUESTIONS, TEXT = (
    Row("questions", _only(questions.see, "question"), 0.93),
    Row("text", questions.ask_text, 0.97),
)
ROWS = (
    ONE,
    TWO,
    COUNT,
    THREE,
    Row("as a person asks", person, 0.85),
    Row("edits", edits.edit, 0.85),
    DESCRIBE,
    QUESTIONS,
    TEXT,
    *(_again(row, "think", think=True) for row in (TWO, COUNT, QUESTIONS, TEXT)),
    *(_again(row, "no guidance", options=OFF) for row in (TWO, COUNT)),
    *(
        Row(f"edit: {make.__name__}", make, extra=True)
        for make in (edits.recolour, edits.add, edits.remove, edits.move, edits.background)
    ),
)


def rows_named(words: Sequence[str]) -> list[Row]:
    """The rows whose name contains one of the words; without words, all but the extra ones.

    Raises ConfigError for a word that matches no row.
    """
    for word in words:
        if not any(word in row.name for row in ROWS):
            raise ConfigError(f"{word!r} names no row; the rows are: {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if (any(word in row.name for word in words) if words else not row.extra)]


def picture_of(scene: Scene) -> Image.Image:
    """A scene as the renderer draws it."""
    return to_pictures(_renderer(encode_scenes([scene])))[0]


_renderer = Renderer("cpu")


def cases(row: Row, seed: int, count: int, steps: int) -> list[Case]:
    """The requests of a row, with prompts and noise from the seed."""
    # By name, so that a row's prompts do not depend on the other rows.
    rng = Random(f"{row.prompts or row.name}-{seed}")
    return [_case(row, row.make(rng), seed * 1_000_003 + i, steps) for i in range(count)]


def _case(row: Row, example: Example, seed: int, steps: int) -> Case:
    draws, reads = example.target is not None, example.source is not None
    kinds = {
        (True, False): Modality.TEXT2IMG,
        (True, True): Modality.IMG2IMG,
        (False, True): Modality.IMG2TEXT,
        (False, False): Modality.TEXT2TEXT,
    }
    parts: Prompt = (TextPart(example.texts[-1]),)
    if example.source is not None:
        parts = (ImagePart(picture_of(example.source), for_generation=draws), *parts)
    options: dict[str, Any] = {"seed": seed, "think": row.think, **row.options}
    limits = {"max_think_tokens": 160, "steps": steps} if draws else {"max_tokens": 160}
    return Case(row, example, resolve(kinds[draws, reads], parts, options, limits))


def judge(case: Case, result: Result) -> tuple[bool, str]:
    """Whether a result is right, and what the checker saw, in words."""
    example = case.example
    if example.target is None:
        return answered(example, result.text), result.text
    assert result.image is not None and example.wanted is not None
    seen = read(result.image)
    right = satisfies(seen, example.wanted)
    if example.source is not None:
        allowed = touched(example.source, example.target, seen)
        share = unchanged(picture_of(example.source), result.image, allowed)
        # Not 100%: the autoencoder moves a few pixels of every edit.
        return right and share >= 0.95, f"{seen}; {share:.1%} of the rest unchanged"
    return right, str(seen)


def touched(source: Scene, target: Scene, seen: Seen) -> Mask:
    """The pixels that an edit may change: around the expected difference, and around a new object."""
    before, after = (np.asarray(picture_of(each), dtype=np.int16) for each in (source, target))
    mask: Mask = ndimage.binary_dilation(np.abs(before - after).max(axis=-1) > 0, iterations=EDGE)
    new = {(item.shape, item.colour, item.cell) for item in target.items if item not in source.items}
    for found in seen.objects:  # a new object may lie anywhere within its cell
        if (found.shape, found.colour, found.cell) in new:
            y, x, reach = round(found.y), round(found.x), round(found.reach) + EDGE
            mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = True
    return mask


def answered(example: Example, reply: str) -> bool:
    """Whether a reply is right. A description must name every object with its colour, and no other."""
    given = reply.rsplit("</think>", 1)[-1].strip().lower()
    right = example.answer or ""
    if example.what == "describe":  # the order and the sizes do not matter
        return _named(given) == _named(right)
    return given.rstrip(".") == right.rstrip(".")


_MANY = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
_NOUNS = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
_NAMED = re.compile(rf"(?:\b({'|'.join(_MANY)}) )?(?:large |small )?\b({'|'.join(COLOURS)}) ({'|'.join(_NOUNS)})\b")


def _named(text: str) -> Counter[tuple[str, str]]:
    """Count the objects that a text names, by colour and shape."""
    found: Counter[tuple[str, str]] = Counter()
    for many, colour, noun in _NAMED.findall(text):
        found[colour, _NOUNS[noun]] += _MANY.get(many, 1)
    return found
