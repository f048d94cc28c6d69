"""The pixel checker reads rendered truth, and rejects what is not asked for."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
from PIL import Image

from training.nano.checker import read, satisfies
from training.nano.images import to_pictures
from training.nano.render import Renderer, encode_scenes
from training.nano.texts import Example, Thing, draw, edit
from training.nano.world import COLOURS, SHAPES


def _drawn(count: int) -> tuple[list[Example], list[Image.Image]]:
    rng = Random(11)
    examples = [edit(rng) if i % 3 == 0 else draw(rng) for i in range(count)]
    scenes = [example.target for example in examples if example.target is not None]
    return examples, to_pictures(Renderer("cpu")(encode_scenes(scenes)))


def test_rendered_truth_is_right() -> None:
    examples, pictures = _drawn(600)
    wrong = [
        (example.texts, str(read(picture)), example.target)
        for example, picture in zip(examples, pictures, strict=True)
        if example.wanted is None or not satisfies(read(picture), example.wanted)
    ]
    assert len(wrong) <= 3, wrong[:5]


def test_other_pictures_are_rejected() -> None:
    examples, pictures = _drawn(300)
    accepted = 0
    for i, example in enumerate(examples):
        wanted = example.wanted
        assert wanted is not None
        seen = read(pictures[i])
        if not wanted.things:
            continue
        first, rest = wanted.things[0], wanted.things[1:]
        for other in (
            replace(first, colour=next(c for c in COLOURS if c != first.colour)),
            replace(first, shape=next(s for s in SHAPES if s != first.shape)),
        ):
            accepted += satisfies(seen, replace(wanted, things=(other, *rest)))
        accepted += satisfies(seen, replace(wanted, things=rest))
        accepted += satisfies(seen, replace(wanted, things=(*wanted.things, Thing("circle", "red"))))
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        if wanted.relations and wanted.things[0] != wanted.things[1]:
            a, kind, b = wanted.relations[0]
            accepted += satisfies(seen, replace(wanted, relations=((a, opposite[kind], b),)))
    assert accepted == 0


def test_noise_and_blobs_are_rejected() -> None:
    examples, _ = _drawn(20)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    blank = Image.new("RGB", (128, 128), "white")
    for example in examples:
        assert example.wanted is not None
        assert not satisfies(read(noise), example.wanted)
        assert not example.wanted.things or not satisfies(read(blank), example.wanted)
