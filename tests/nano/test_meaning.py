"""What the shipped model draws and says means something: prompts, guidance, edits and plans are followed.

Seeds are fixed. Pictures are judged by their pixels (training/nano/checker.py), through the services.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import bagel
from bagel.client.batch import ask_of, generate_all
from bagel.deployment.defaults import NANO_NAME
from bagel.events import Result
from tests.helpers import agree
from tests.shared import Borrow
from training.nano.checker import Seen, read
from training.nano.rows import ROWS, Case, cases, judge, picture_of
from training.nano.world import CELLS, Item, Scene

pytestmark = pytest.mark.slow
STEPS = 20
SEED = 20261


@pytest.fixture
def omni(borrow: Borrow) -> bagel.Omni:
    return borrow("bagel", NANO_NAME).omni


def asked(row: str, count: int) -> list[Case]:
    found = next(each for each in ROWS if each.name == row)
    return cases(found, SEED, count, STEPS)


def right(omni: bagel.Omni, chosen: Sequence[Case]) -> int:
    """How many are answered rightly."""
    results = omni.generate([case.request for case in chosen])
    return sum(judge(case, result)[0] for case, result in zip(chosen, results, strict=True))


def drawn(result: Result) -> Seen:
    assert result.image is not None
    return read(result.image)


def test_guidance_beats_no_guidance(omni: bagel.Omni) -> None:
    chosen = asked("two objects", 10) + asked("count to four", 10)
    guided = right(omni, chosen)
    settings = [replace(case.request.image, cfg_text_scale=1.0, cfg_img_scale=1.0) for case in chosen]
    unguided = [
        replace(case, request=replace(case.request, image=image)) for case, image in zip(chosen, settings, strict=True)
    ]
    assert guided >= 14
    assert guided > right(omni, unguided)


def test_the_negative_prompt_takes_something_away(omni: bagel.Omni) -> None:
    """The prompt leaves the size open; the negative prompt closes it."""
    count = 8

    def sizes_with(**options: Any) -> Counter[str]:
        """In how many of the pictures there is a large blue square, in how many a small one."""
        results = [omni.generate("a blue square", seed=seed, steps=STEPS, **options)[0] for seed in range(count)]
        squares = (each for result in results for each in drawn(result).objects if each.colour == "blue")
        return Counter(each.size for each in squares if each.shape == "square")

    without, steered = sizes_with(), sizes_with(negative_prompt="a large blue square")
    assert without["large"] >= 4
    assert steered["large"] <= 1
    assert steered["small"] >= without["small"] + 3


def test_edits_change_what_they_name_and_leave_the_rest(omni: bagel.Omni) -> None:
    assert right(omni, asked("edits", 8)) >= 6


def test_another_instruction_makes_another_picture(omni: bagel.Omni) -> None:
    circle = Item("circle", "red", "large", 21, 3, 30, 64)
    square = Item("square", "blue", "small", 12, 8, 100, 98)
    before = picture_of(Scene((circle, square)))
    for instruction, expected in (
        ("make the circle green", {("green", "circle"), ("blue", "square")}),
        ("remove the square", {("red", "circle")}),
        (
            "add a small yellow star in the top right corner",
            {("red", "circle"), ("blue", "square"), ("yellow", "star")},
        ),
    ):
        [result] = omni.generate(instruction, modality="img2img", image=before, seed=3, steps=STEPS)
        assert {(each.colour, each.shape) for each in drawn(result).objects} == expected, instruction


def test_the_plan_is_what_is_drawn(omni: bagel.Omni) -> None:
    chosen = asked("think: two objects", 4) + asked("think: count to four", 4)
    results = omni.generate([case.request for case in chosen])
    assert all(re.fullmatch(r"<think> .* </think>", result.text) for result in results)
    assert sum(planned(result.text) == shown(drawn(result)) for result in results) >= 6


PLANNED = re.compile(rf": (small|large) (\w+) (\w+) at the ({'|'.join(sorted(CELLS, key=len, reverse=True))})\b")


def planned(text: str) -> tuple[list[tuple[str, ...]], str]:
    """Objects and background of a think text."""
    ground = re.search(r"\. (\w+) background\.", text)
    return sorted(match.groups() for match in PLANNED.finditer(text)), ground[1] if ground else "?"


def shown(seen: Seen) -> tuple[list[tuple[str, ...]], str]:
    return sorted((o.size, o.colour, o.shape, CELLS[o.cell]) for o in seen.objects), seen.background


def test_descriptions_name_the_objects_and_questions_are_answered(omni: bagel.Omni) -> None:
    assert right(omni, asked("description", 10)) >= 8
    assert right(omni, asked("questions", 10)) >= 8
    assert right(omni, asked("text", 10)) >= 8


@pytest.mark.parametrize("topology", ["bagel_think", "bagel_single_stage"])
def test_every_topology_gives_the_same(borrow: Borrow, topology: str) -> None:
    chosen = [case for row in ("two objects", "think: count to four", "edits", "questions") for case in asked(row, 1)]
    requests = [case.request for case in chosen]
    two = borrow("bagel", NANO_NAME)
    single = topology == "bagel_single_stage"
    other = borrow(topology, NANO_NAME).address if single else two.gateway(pipeline=topology).address(0)
    others = generate_all(other, [ask_of(each) for each in requests])
    pairs = list(zip(two.omni.generate(requests), others, strict=True))
    for one, same in pairs:
        assert one.text == same.text
        if one.image is not None and same.image is not None:
            assert agree(one.image, same.image)
    assert sum(one.image is not None for one, _ in pairs) == 3
