"""Requests survive the wire unchanged, whatever their settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bagel.errors import InvalidRequest
from bagel.images import pixel_digest
from bagel.prompts import BranchName, ImagePart, TextPart
from bagel.request import (
    MAX_SEED,
    MAX_TEMPERATURE,
    PENALTIES,
    ImageSettings,
    Modality,
    PosteriorMode,
    RenormType,
    TextSettings,
    resolve,
)
from bagel.rpc import convert
from bagel.v1 import common_pb2

COUNTS = st.integers(1, 2**31)
UNIT = st.floats(0.0, 1.0)
SCALES = st.floats(0.0, 100.0)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, MAX_SEED),
        "think": st.booleans(),
        "max_think_tokens": COUNTS,
        "negative_prompt": TEXTS,
        "posterior": st.sampled_from(PosteriorMode),
        "do_sample": st.booleans(),
        "temperature": st.floats(0.0, MAX_TEMPERATURE),
        "top_p": st.floats(0.001, 1.0),
        "top_k": st.integers(0, 2**31),
        "repetition_penalty": st.floats(*PENALTIES),
        "max_tokens": COUNTS,
        "stop_token_ids": st.lists(st.integers(0, 2**31), min_size=1, max_size=4).map(tuple),
        "steps": st.integers(2, 1000),
        "timestep_shift": st.floats(0.001, 100.0),
        "cfg_text_scale": SCALES,
        "cfg_img_scale": SCALES,
        "cfg_interval": st.tuples(UNIT, UNIT).map(lambda ends: (min(ends), max(ends))),
        "cfg_renorm_type": st.sampled_from(RenormType),
        "cfg_renorm_min": UNIT,
        "height": st.integers(16, 4096),
        "width": st.integers(16, 4096),
    },
)
MODALITIES = st.sampled_from(Modality)
PARTS = [convert.part_to_wire(TextPart("a red cube"))]


@given(MODALITIES, OPTIONS)
def test_options_come_back_as_they_were_given(modality: Modality, options: dict[str, Any]) -> None:
    """Also what is zero or false; what was not given stays not given."""
    sent = convert.options_to_wire(modality, PARTS, options).SerializeToString()
    message = common_pb2.Request.FromString(sent)
    assert convert.options_from_wire(message) == options
    assert convert.modality_from_wire(message.modality) is modality


@given(MODALITIES, OPTIONS)
def test_a_resolved_request_comes_back_whole(modality: Modality, options: dict[str, Any]) -> None:
    request = resolve(modality, (TextPart("a red cube"),), {}, options)
    sent = convert.request_to_wire(request, PARTS).SerializeToString()
    assert convert.request_from_wire(common_pb2.Request.FromString(sent)) == request


def test_every_option_of_a_request_can_be_sent() -> None:
    """A field added to the request must come to the wire, and to this test."""
    fields = {*TextSettings.__dataclass_fields__, *ImageSettings.__dataclass_fields__}
    fields |= {"seed", "think", "max_think_tokens", "negative_prompt", "posterior"}
    everything = resolve(Modality.TEXT2IMG, (TextPart("x"),), {}, {"height": 64, "width": 64, "stop_token_ids": [3]})
    options = {
        name: getattr(owner, name)
        for owner in (everything, everything.text, everything.image)
        for name in fields
        if hasattr(owner, name)
    }
    assert options.keys() == fields
    assert convert.options_from_wire(convert.options_to_wire(Modality.TEXT2IMG, PARTS, options)) == options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sede", 1),
        ("prompt", "a cat"),
        ("seed", -1),
        ("steps", "many"),
        ("steps", 2.5),
        ("cfg_interval", 0.4),
        ("posterior", "none"),
        ("cfg_renorm_type", "local"),
        ("stop_token_ids", [-1]),
    ],
)
def test_what_no_field_can_hold_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        convert.options_to_wire(Modality.TEXT2IMG, PARTS, {name: value})
    assert refused.value.field == name


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", -1, f"seed is -1; it must be a whole number from 0 to {2**63 - 1}"),
        ("steps", "3", "steps is '3'; it must be a whole number from 2 to 1000"),
        ("steps", True, "steps is True; it must be a whole number from 2"),
        ("cfg_interval", (0.4,), "cfg_interval is (0.4,); it must be two numbers"),
        ("stop_token_ids", [-1], "stop_token_ids is -1; it must be a whole number at least 0"),
        ("stop_token_ids", 5, "stop_token_ids is 5; it must be a list"),
        ("posterior", "none", "it must be one of content, seed, mean"),
        ("width", 10**12, f"width is {10**12}; the largest number it takes is {2**32 - 1}"),
    ],
)
def test_what_no_field_can_hold_is_refused_with_what_may_be(name: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        convert.options_to_wire(Modality.TEXT2IMG, PARTS, {name: value})
    assert words in str(refused.value)


def test_none_is_not_given() -> None:
    assert convert.options_from_wire(convert.options_to_wire(Modality.TEXT2IMG, PARTS, {"steps": None})) == {}


@pytest.mark.parametrize(("generation", "understanding"), [(True, True), (True, False), (False, True)])
def test_images_arrive_pixel_for_pixel(generation: bool, understanding: bool) -> None:
    image = Image.linear_gradient("L").convert("RGB").resize((37, 23))
    part = ImagePart(image, for_generation=generation, for_understanding=understanding)
    back = convert.prompt_from_wire([convert.part_to_wire(part)])[0]
    assert isinstance(back, ImagePart)
    assert pixel_digest(back.pixels) == pixel_digest(image)
    assert replace(back, image=image) == part


def test_settings_and_names_come_back() -> None:
    text, image = TextSettings(top_k=3, stop_token_ids=(1, 2)), ImageSettings(height=64, cfg_interval=(0.0, 0.5))
    assert convert.text_settings_from_wire(convert.text_settings_to_wire(text)) == text
    assert convert.image_settings_from_wire(convert.image_settings_to_wire(image)) == image
    assert [convert.branch_from_wire(convert.branch_to_wire(name)) for name in BranchName] == list(BranchName)
    assert [convert.posterior_from_wire(convert.posterior_to_wire(mode)) for mode in PosteriorMode] == list(
        PosteriorMode
    )
    assert convert.timings_from_wire(convert.timings_to_wire({"queue": 0.5, "text": 1.0})) == {
        "queue": 0.5,
        "text": 1.0,
    }
