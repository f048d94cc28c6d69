"""The pixel checker reads rendered truth, and rejects what is not asked for."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bagel.errors import ConfigError
from bagel.events import Result
from training.nano.checker import read, satisfies
from training.nano.drawing import draw
from training.nano.edits import add, edit, move, recolour, remove
from training.nano.evaluate import wilson
from training.nano.examples import Example, Thing
from training.nano.images import to_pictures
from training.nano.render import Renderer, encode_scenes
from training.nano.rows import ROWS, answered, cases, judge, person, picture_of, rows_named
from training.nano.world import BACKGROUNDS, COLOURS, SHAPES, Look, Scene, fits, make_scene, place

pytestmark = pytest.mark.slow


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


def test_an_edit_may_put_its_object_anywhere_in_the_cell() -> None:
    rng, judged = Random(5), 0
    for _ in range(80):
        made = rng.choice((add, move))(rng)
        assert made.source is not None and made.target is not None
        [new] = [item for item in made.target.items if item not in made.source.items]
        other = replace(place(rng, Look(new.shape, new.colour, new.size), new.cell), radius=new.radius)
        rest = [item for item in made.target.items if item is not new]
        if not fits(other, rest):
            continue
        assert edited_rightly(made, make_scene([*rest, other], made.target.background)), (made.texts, other)
        judged += 1
    assert judged > 40


def test_an_edit_that_changes_the_rest_is_wrong() -> None:
    rng = Random(6)
    for make in (recolour, add, remove, move):
        made = make(rng)
        assert made.target is not None
        ground = next(name for name in BACKGROUNDS if name != made.target.background)
        assert edited_rightly(made, made.target)
        assert not edited_rightly(made, replace(made.target, background=ground))
        assert not edited_rightly(made, made.source)


def edited_rightly(example: Example, drawn: Scene | None) -> bool:
    """The verdict on a scene in the place of what a model draws."""
    assert drawn is not None
    row = next(row for row in ROWS if row.name == "edits")
    [case] = cases(replace(row, make=lambda _: example), seed=1, count=1, steps=10)
    return judge(case, Result(0, picture_of(drawn), "", (), 1))[0]


def test_soft_edges_change_no_shape() -> None:
    rng = Random(7)
    for _ in range(40):
        made = draw(rng)
        assert made.target is not None and made.wanted is not None
        soft = picture_of(made.target).filter(ImageFilter.GaussianBlur(1.0))
        assert satisfies(read(soft), made.wanted), (str(read(soft)), made.texts)


def test_a_person_leaves_places_and_some_backgrounds_open() -> None:
    rng = Random(8)
    asked = [person(rng) for _ in range(120)]
    grounds = [each.wanted.background for each in asked if each.wanted is not None]
    assert 10 < grounds.count(None) < 60
    for each in asked:
        assert each.target is not None and each.wanted is not None
        assert satisfies(read(picture_of(each.target)), each.wanted)
        said = each.texts[0].lower()
        assert each.wanted.background is None or each.wanted.background in said
        assert all(thing.cell is None and thing.colour in said and thing.shape in said for thing in each.wanted.things)


def test_rows_compared_have_the_same_prompts_and_noise() -> None:
    named = {row.name: cases(row, 3, 10, 50) for row in ROWS}
    for name in ("two objects", "count to four"):
        for other in (f"think: {name}", f"no guidance: {name}"):
            assert [case.example for case in named[name]] == [case.example for case in named[other]]
            assert [case.request.seed for case in named[name]] == [case.request.seed for case in named[other]]
    first, second = (cases(ROWS[0], seed, 20, 50) for seed in (1, 2))
    assert not {case.example.texts for case in first} & {case.example.texts for case in second}


def test_rows_are_chosen_by_words() -> None:
    assert [row.name for row in rows_named(["one obj", "text"])] == ["one object", "text", "think: text"]
    assert "edits" in [row.name for row in rows_named([])]
    assert not any(row.extra for row in rows_named([]))
    with pytest.raises(ConfigError, match=r"'zebra' names no row; the rows are: one object, "):
        rows_named(["zebra"])


def test_counted_and_listed_descriptions_are_the_same() -> None:
    example = Example("describe", ("?",), answer="two small red crosses on a white background.")
    assert answered(example, "a red cross and a small red cross.")
    assert not answered(example, "a small red cross.")
    assert not answered(example, "three small red crosses on a white background.")
    assert not answered(example, "two small blue crosses on a white background.")


def test_intervals_are_wilsons() -> None:
    low, high = wilson(194, 200)  # R: binom.confint(194, 200, method="wilson")
    assert (round(low, 4), round(high, 4)) == (0.9361, 0.9862)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
