"""Prompts as the branches of guidance: the reference's rules, case by case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bagel.errors import IncompleteContext, InvalidRequest
from bagel.prompts import (
    THINK_IMAGE_PROMPT,
    THINK_TEXT_PROMPT,
    Branch,
    BranchName,
    ImagePart,
    Part,
    Prompt,
    TextPart,
    collect_cfg_kv_caches,
    expand_cfg_prompts,
    expand_cfg_prompts_think,
    text_prompt,
)

GOLDEN = Path(__file__).parent / "golden" / "fp32"
A, B = TextPart("make it brighter"), TextPart("a cat in a straw hat")
X, Y = (ImagePart(Image.new("RGB", (16, 16), colour), for_generation=True) for colour in ("red", "blue"))
SYSTEM, NEGATIVE = TextPart(THINK_IMAGE_PROMPT), TextPart("blurry")
GEN, CFG_TEXT, CFG_IMG = BranchName


def parts(branches: tuple[Branch, ...]) -> list[Prompt]:
    assert [branch.name for branch in branches] == [GEN, CFG_TEXT, CFG_IMG]
    return [branch.parts for branch in branches]


@pytest.mark.parametrize(
    ("prompt", "cfg_text", "cfg_img"),
    [
        pytest.param((A,), (), (A,), id="text to image"),
        pytest.param((X, A), (X,), (A,), id="edit"),
        pytest.param((X, A, Y, B), (X, A, Y), (A, B), id="interleaved"),
        pytest.param((X, Y, A), (X, Y), (A,), id="two images"),
        pytest.param((A, B), (A,), (A, B), id="two texts"),
        # An image after the last text belongs to cfg_text too, so the text guides nothing.
        pytest.param((A, X), (A, X), (A,), id="text before the image"),
        pytest.param((X,), (X,), (), id="image alone"),
    ],
)
def test_branches(prompt: tuple[Part, ...], cfg_text: Prompt, cfg_img: Prompt) -> None:
    assert parts(expand_cfg_prompts(prompt)) == [prompt, cfg_text, cfg_img]


@pytest.mark.parametrize("prompt", [(A,), (X, A), (A, X)], ids=["text to image", "edit", "text before the image"])
def test_a_negative_prompt_ends_cfg_text_alone(prompt: tuple[Part, ...]) -> None:
    gen, cfg_text, cfg_img = parts(expand_cfg_prompts(prompt))
    assert parts(expand_cfg_prompts(prompt, negative_prompt="blurry")) == [gen, (*cfg_text, NEGATIVE), cfg_img]


@pytest.mark.parametrize(
    ("prompt", "cfg_text", "cfg_img"),
    [
        pytest.param((A,), (SYSTEM,), (SYSTEM, A), id="text to image"),
        pytest.param((X, A), (SYSTEM, X), (SYSTEM, A), id="edit"),
    ],
)
def test_thinking_puts_the_system_prompt_first(prompt: tuple[Part, ...], cfg_text: Prompt, cfg_img: Prompt) -> None:
    assert parts(expand_cfg_prompts_think(prompt)) == [(SYSTEM, *prompt), cfg_text, cfg_img]
    _, negative, _ = parts(expand_cfg_prompts_think(prompt, negative_prompt="blurry"))
    assert negative == (*cfg_text, NEGATIVE)


def test_only_gen_writes_a_think_text() -> None:
    assert [branch.max_tokens for branch in expand_cfg_prompts_think((X, A), max_think_tokens=77)] == [77, 1, 1]
    assert [branch.max_tokens for branch in expand_cfg_prompts((X, A))] == [1, 1, 1]


def test_the_system_prompts_are_the_references() -> None:
    recorded = json.loads((GOLDEN / "think_edit.json").read_text())
    assert recorded["system_prompt"] == THINK_IMAGE_PROMPT
    assert THINK_TEXT_PROMPT.count(" \n") == THINK_TEXT_PROMPT.count("\n") == 1
    assert text_prompt((X, A), think=True) == (TextPart(THINK_TEXT_PROMPT), X, A)
    assert text_prompt((X, A), think=False) == (X, A)


def test_an_image_is_for_something() -> None:
    with pytest.raises(InvalidRequest, match="neither is set") as caught:
        ImagePart(Image.new("RGB", (16, 16)), for_generation=False, for_understanding=False)
    assert caught.value.field == "image"


def test_the_needed_contexts_are_collected() -> None:
    branches = expand_cfg_prompts((X, A))
    contexts = {GEN: "g", CFG_TEXT: "t", CFG_IMG: "i"}
    assert collect_cfg_kv_caches(branches, contexts, frozenset(BranchName)) == contexts
    assert collect_cfg_kv_caches(branches, contexts, frozenset({GEN, CFG_TEXT})) == {GEN: "g", CFG_TEXT: "t"}
    assert collect_cfg_kv_caches(branches, {GEN: "g"}, frozenset({GEN})) == {GEN: "g"}


@pytest.mark.parametrize("lost", BranchName)
def test_a_lost_context_is_an_error_that_names_it(lost: BranchName) -> None:
    contexts = {name: "kv" for name in BranchName if name is not lost}
    with pytest.raises(IncompleteContext, match=rf"no K/V for the branch {lost};"):
        collect_cfg_kv_caches(expand_cfg_prompts((X, A)), contexts, frozenset(BranchName))


def test_a_needed_branch_that_was_never_made_is_an_error() -> None:
    gen, *_ = expand_cfg_prompts((X, A))
    with pytest.raises(IncompleteContext, match="cfg_text"):
        collect_cfg_kv_caches((gen,), {GEN: "kv"}, frozenset({GEN, CFG_TEXT}))


def test_a_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="UTF-8 text at character 3"):
        TextPart("ab\udcff")
