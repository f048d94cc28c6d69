"""Every pair of settings of which one makes the other meaningless: refused on every front, by the same table."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bagel.client.batch import ask_of
from bagel.effect import NEUTRAL, RULES, Facts, Rule, check_effect, effective, neutral_table, rule_list
from bagel.errors import InvalidRequest
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import ImageSettings, Modality, Request, TextSettings, resolve, text_settings
from tests.rpc.test_convert import OPTIONS

DOCS = Path(__file__).parents[1] / "docs/options.md"
SAMPLE: dict[str, Any] = {
    "steps": 9,
    "timestep_shift": 2.0,
    "cfg_text_scale": 3.0,
    "cfg_img_scale": 2.0,
    "cfg_interval": (0.2, 0.8),
    "cfg_renorm_type": "channel",
    "cfg_renorm_min": 0.5,
    "negative_prompt": "blurry",
    "height": 64,
    "width": 64,
    "posterior": "mean",
    "max_tokens": 5,
    "max_think_tokens": 5,
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "repetition_penalty": 1.5,
    "stop_token_ids": [3],
    "output_format": "JPEG",
    "output_compression": 50,
    "partial_images": 2,
    "progress": True,
}
"""A value of each setting that asks for something."""
NO_PAIR = {"seed": "harmless where nothing is drawn by chance", "think": "always done, or not"}
EMPTY = (0.98, 0.99)
"""Holds no timestep of 9."""
HOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "on a text answer": ("text2text", {}),
    "on a picture": ("text2img", {"think": True}),
    "on a picture without think": ("text2img", {}),
    "on an answer without think that max_tokens bounds": ("text2text", {"max_tokens": 9}),
    "where no image is edited": ("text2img", {}),
    "without sampling": ("text2text", {}),
    "at temperature 0, which takes the likeliest token": ("text2text", {"temperature": 0, "do_sample": True}),
    "with top_k 1, which leaves one token": ("text2text", {"top_k": 1, "do_sample": True}),
    "without guidance, which cfg_text_scale at most 1 switches off": ("text2img", {"cfg_text_scale": 1}),
    "as it holds no timestep of the schedule": ("text2img", {"cfg_interval": EMPTY, "steps": 9}),
    "as cfg_interval holds no timestep of the schedule, so that nothing is guided": (
        "text2img",
        {"cfg_interval": (0.5, 0.5)},
    ),
    "where cfg_renorm_min is 1, which is no renorm": ("text2img", {"cfg_renorm_min": 1.0}),
    "with 2 timesteps, which are 1 and 0 however they are shifted": ("text2img", {"steps": 2}),
    "on PNG, which loses nothing": ("text2img", {}),
    "with 2 timesteps, whose one step ends in the picture": ("text2img", {"steps": 2}),
    "without a stream": ("text2img", {}),
}
"""For each rule a request in which it holds."""
OUTPUT = ("output_format", "output_compression", "partial_images", "progress")
PAIRS = [(rule, name) for rule in RULES for name in rule.settings]


def prompt(modality: str) -> Prompt:
    image = ImagePart(Image.new("RGB", (64, 64)), for_generation=modality == "img2img")
    return (*((image,) if Modality(modality).reads_image else ()), TextPart("a red cube"))


def ask(modality: str, options: dict[str, Any], *, streams: bool = True) -> Request:
    """Ask as a front does: the request, then how its picture is given out."""
    output = {name: value for name, value in options.items() if name in OUTPUT}
    request = resolve(Modality(modality), prompt(modality), {k: v for k, v in options.items() if k not in OUTPUT})
    check_effect(Facts(request, output_format=output.get("output_format", "PNG"), streams=streams), output)
    return request


@pytest.mark.parametrize(("rule", "name"), PAIRS, ids=lambda each: each if isinstance(each, str) else each.when)
def test_what_has_no_effect_is_refused_by_name_and_what_asks_for_nothing_is_not(rule: Rule, name: str) -> None:
    modality, base = HOLDS[rule.when]
    base = {key: value for key, value in base.items() if key != name or rule.when.startswith(("as it", "at"))}
    streams = rule.when != "without a stream"
    with pytest.raises(InvalidRequest, match=f"^{name} has no effect {rule.when}; ") as caught:
        ask(modality, {**base, name: base.get(name, SAMPLE[name])}, streams=streams)
    assert caught.value.field == name
    neutral = {"do_sample": False, "stop_token_ids": [], "negative_prompt": " ", "cfg_interval": (0.3, 0.3)}
    neutral |= {"output_format": "PNG", "progress": False, "temperature": 0, "top_k": 0, "partial_images": 0}
    neutral |= dict.fromkeys(("top_p", "repetition_penalty", "cfg_text_scale", "cfg_img_scale", "timestep_shift"), 1)
    neutral |= {"cfg_renorm_min": 0}
    assert neutral.keys() == NEUTRAL.keys()
    if name in neutral:
        given = {name: neutral[name]}
        resolve(Modality(modality), prompt(modality), {k: v for k, v in given.items() if k not in OUTPUT}, base)
        ask(modality, {k: v for k, v in given.items() if k in OUTPUT}, streams=streams)


def test_the_table_names_every_setting_of_a_request() -> None:
    settings = {field.name for cls in (TextSettings, ImageSettings, Request) for field in fields(cls)}
    settings -= {"modality", "prompt", "text", "image"}
    named = {name for rule in RULES for name in rule.settings}
    assert settings | {*OUTPUT} == named | NO_PAIR.keys()
    assert {rule.when for rule in RULES} == HOLDS.keys()


@pytest.mark.parametrize(
    ("modality", "options"),
    [
        ("text2img", {"cfg_img_scale": 2.0}),  # without an image it scales the text's guidance
        ("text2img", {"cfg_text_scale": 1, "cfg_img_scale": 1, "cfg_renorm_min": 0, "negative_prompt": ""}),
        ("text2img", {"cfg_interval": (0.4, 1.0), "steps": 2}),
        ("text2img", {"partial_images": 3, "steps": 3, "timestep_shift": 2}),
        ("text2img", {"output_format": "JPEG", "output_compression": 0}),
        ("text2text", {"max_think_tokens": 5}),  # bounds the answer, as the reference's one limit does
        ("text2text", {"temperature": 0, "top_p": 1, "top_k": 0, "seed": 5, "repetition_penalty": 1.2}),
        ("text2text", {"top_k": 1, "do_sample": True}),
        ("img2img", {"posterior": "mean", "think": True, "max_think_tokens": 5}),
    ],
)
def test_what_has_an_effect_is_not_refused(modality: str, options: dict[str, Any]) -> None:
    ask(modality, options)


@pytest.mark.parametrize("modality", Modality)
def test_defaults_conflict_with_nothing(modality: Modality) -> None:
    deploy = {"temperature": 0.9, "top_k": 3, "max_tokens": 9, "cfg_text_scale": 1.0, "negative_prompt": "x"}
    resolve(modality, prompt(modality), {}, deploy)
    with pytest.raises(InvalidRequest, match="negative_prompt"):  # but what the user adds to them must do something
        resolve(Modality.TEXT2IMG, prompt("text2img"), {"negative_prompt": "y"}, deploy)


def test_an_image_that_is_only_looked_at_has_no_posterior() -> None:
    seen = (ImagePart(Image.new("RGB", (64, 64)), for_generation=False), TextPart("x"))
    with pytest.raises(InvalidRequest, match="where no image is edited"):
        resolve(Modality.IMG2IMG, seen, {"posterior": "mean"})


@given(st.sampled_from(Modality), OPTIONS, st.fixed_dictionaries({}, optional={"cfg_text_scale": st.just(2.0)}))
def test_the_effective_settings_make_the_same_request_whatever_the_defaults(
    modality: Modality, options: dict[str, Any], deploy: dict[str, Any]
) -> None:
    whole = resolve(modality, prompt(modality), {}, options)
    options = {name: value for name, value in ask_of(whole).items() if name not in ("prompt", "modality")}
    again = resolve(modality, prompt(modality), options, deploy)
    assert again.seed == whole.seed and again.think == whole.think
    if modality.makes_image:
        kept = effective(whole, {field.name: getattr(whole.image, field.name) for field in fields(ImageSettings)})
        assert {name: getattr(again.image, name) for name in kept} == kept
        assert guided(again) == guided(whole)
    if whole.think or not modality.makes_image:
        assert decoding(again) == decoding(whole)


def guided(request: Request) -> object:
    from bagel.guidance import needed_branches

    return needed_branches(request.image)


def decoding(request: Request) -> object:
    text = text_settings(request)
    greedy = not text.do_sample or text.temperature < 1e-37
    chosen = None if greedy else (text.top_k,) if text.top_k == 1 else (text.temperature, text.top_p, text.top_k)
    return (chosen, text.repetition_penalty, text.max_tokens, text.stop_token_ids)


def test_docs_print_the_rules() -> None:
    text = DOCS.read_text()
    assert rule_list() in text and neutral_table() in text
