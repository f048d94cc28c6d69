"""The rows of the evaluation: how each draws its prompts, asks them, and judges what comes back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from bagel.events import Result
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import Modality, Request, resolve
from training.nano import texts
from training.nano.checker import Mask, read, satisfies, unchanged
from training.nano.images import to_pictures
from training.nano.phrases import plural
from training.nano.render import Renderer, encode_scenes
from training.nano.texts import Example
from training.nano.world import COLOURS, SHAPES, Scene

OFF = {"cfg_text_scale": 1.0, "cfg_img_scale": 1.0}


@dataclass(frozen=True)
class Row:
    """One line of the table. goal: the share to reach, None where there is none; options go with every request."""

    name: str
    make: Callable[[Random], Example]
    goal: float | None = None
    think: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One request and what is right."""

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


def _question(rng: Random) -> Example:
    return _only(texts.see, "question")(rng)


def person(rng: Random) -> Example:
    """Drawing as a person asks for it, in forms that training has not."""
    example = rng.choice((texts.one, texts.two, texts.count))(rng)
    wanted = example.wanted
    assert wanted is not None
    things = [f"{t.size + ' ' if t.size else ''}{t.colour} {t.shape}" for t in wanted.things]
    if example.what == "two":
        side = {"left": "left of", "right": "to the right of", "above": "above", "below": "below"}
        body = f"{things[0]} {side[wanted.relations[0][1]]} a {things[1]}"
    elif example.what == "count":
        body = f"{len(things)} {plural(things[0])}"
    else:
        body = f"a {things[0]}"
        wanted = replace(wanted, things=(replace(wanted.things[0], cell=None),))
    ground = wanted.background or "white"
    forms = (
        "{body}, {ground} bg",
        "please draw {body} on a {ground} background.",
        "Could you please draw {body}? The background should be {ground}.",
        "I want to see {body} on {ground}",
        "{body} {ground} background",
        "Hi! Draw {body}, background {ground}, thanks",
        "pls make {body} with a {ground} bg",
    )
    text = rng.choice(forms).format(body=body, ground=ground)
    text = rng.choice((text, text, text.upper(), text[0].upper() + text[1:] + "."))
    return replace(example, what="person", texts=(text,), wanted=wanted)


ROWS = (
    Row("one object", texts.one, 0.97),
    Row("two, relation", texts.two, 0.92),
    Row("count to four", texts.count, 0.85),
    Row("three objects", _only(texts.three, "three"), 0.80),
    Row("as a person asks", person, 0.85),
    Row("edit: recolour", texts.recolour, 0.85),
    Row("edit: add", texts.add, 0.85),
    Row("edit: remove", texts.remove, 0.85),
    Row("edit: move", texts.move, 0.85),
    Row("edit: background", texts.background, 0.85),
    Row("description", _only(texts.see, "describe"), 0.90),
    Row("questions", _question, 0.93),
    Row("text to text", _only(texts.see, "text"), 0.97),
    Row("think: two, relation", texts.two, None, think=True),
    Row("think: count", texts.count, None, think=True),
    Row("think: questions", _question, None, think=True),
    Row("think: text", _only(texts.see, "text"), None, think=True),
    Row("no guidance: two", texts.two, None, options=OFF),
    Row("no guidance: count", texts.count, None, options=OFF),
)


def picture_of(scene: Scene) -> Image.Image:
    """A scene as the renderer draws it."""
    return to_pictures(_renderer(encode_scenes([scene])))[0]


_renderer = Renderer("cpu")


def cases(row: Row, seed: int, count: int, steps: int) -> list[Case]:
    """The requests of a row: prompts and noise from the seed."""
    rng = Random(f"{row.name}-{seed}".replace("no guidance: ", "").replace("think: ", ""))
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
    options |= {"max_think_tokens": 160, "steps": steps} if draws else {"max_tokens": 160}
    return Case(row, example, resolve(kinds[draws, reads], parts, options))


def judge(case: Case, result: Result) -> tuple[bool, str]:
    """Whether a result is right, and what was seen in it."""
    example = case.example
    if example.target is None:
        return answered(example, result.text), result.text
    assert result.image is not None and example.wanted is not None
    seen = read(result.image)
    right = satisfies(seen, example.wanted)
    if example.source is not None:
        allowed = touched(example.source, example.target)
        share = unchanged(picture_of(example.source), result.image, allowed)
        return right and share >= 0.95, f"{seen}; {share:.1%} of the rest unchanged"
    return right, str(seen)


def touched(source: Scene, target: Scene) -> Mask:
    """Where an edit may change pixels: around the difference, and the cells where something is put."""
    before, after = (np.asarray(picture_of(each), dtype=np.int16) for each in (source, target))
    mask: Mask = ndimage.binary_dilation(np.abs(before - after).max(axis=-1) > 0, iterations=4)
    for item in target.items:
        if item not in source.items:
            y, x = item.y, item.x
            reach = item.radius + 14
            mask[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = True
    return mask


def answered(example: Example, reply: str) -> bool:
    """Whether a reply says what is right; a description must name every object with its colour, and no other."""
    said = reply.rsplit("</think>", 1)[-1].strip().lower()
    right = example.answer or ""
    if example.what == "describe":
        return _named(said) == _named(right)
    return said.rstrip(".") == right.rstrip(".")


_NOUNS = "|".join([*SHAPES, *(plural(shape) for shape in SHAPES)])
_NAMED = re.compile(rf"(?:\b(one|two|three|four|an?) )?(?:large |small )?\b({'|'.join(COLOURS)}) ({_NOUNS})")


def _named(text: str) -> list[tuple[str, ...]]:
    found = [(match[1], match[2], match[3]) for match in _NAMED.finditer(text)]
    return sorted(("a" if many in (None, "an") else many, colour, noun) for many, colour, noun in found)
