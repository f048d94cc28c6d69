"""Requests: whose value of a setting holds, what is refused and under which name, and how long a reply may be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bagel.errors import InvalidRequest
from bagel.prompts import TextPart
from bagel.request import MAX_SEED, ImageSettings, Modality, PosteriorMode, RenormType, Request, TextSettings, resolve
from bagel.request import text_settings as text_run_settings

PROMPT = (TextPart("a red cube"),)
PICTURES = [Modality.TEXT2IMG, Modality.IMG2IMG]
REPLIES = [Modality.IMG2TEXT, Modality.TEXT2TEXT]


def request(modality: Modality = Modality.TEXT2IMG, deploy: dict[str, Any] | None = None, **options: Any) -> Request:
    return resolve(modality, PROMPT, options, deploy)


@pytest.mark.parametrize("modality", [mode for mode in Modality if mode is not Modality.IMG2IMG])
def test_defaults(modality: Modality) -> None:
    made = request(modality, seed=1)
    assert made == Request(modality=modality, prompt=PROMPT, seed=1)
    assert made.image == ImageSettings(
        steps=50,
        timestep_shift=3.0,
        cfg_text_scale=4.0,
        cfg_img_scale=1.0,
        cfg_interval=(0.4, 1.0),
        cfg_renorm_type=RenormType.GLOBAL,
        cfg_renorm_min=0.0,
        height=None,
        width=None,
    )
    assert made.text == TextSettings(do_sample=False, temperature=0.3, max_tokens=1000)
    assert (made.think, made.max_think_tokens, made.posterior) == (False, 1000, PosteriorMode.CONTENT)


def test_an_edit_has_its_own_defaults() -> None:
    image = request(Modality.IMG2IMG).image
    assert (image.cfg_img_scale, image.cfg_interval, image.cfg_renorm_type) == (1.5, (0.0, 1.0), "text_channel")
    assert (image.cfg_text_scale, image.steps, image.timestep_shift) == (4.0, 50, 3.0)


def test_the_user_comes_before_the_deploy_file_and_that_before_the_defaults() -> None:
    deploy = {"temperature": 0.4, "top_k": 5, "cfg_interval": [0.2, 0.9], "seed": 52, "steps": 24, "detokenize": True}
    user = {"think": True, "do_sample": True, "top_k": 7, "steps": None}
    made = request(Modality.IMG2IMG, deploy, cfg_renorm_type="channel", cfg_img_scale=2.0, **user)
    assert (made.text.top_k, made.image.cfg_img_scale, made.image.cfg_renorm_type) == (7, 2.0, RenormType.CHANNEL)
    # The deploy file's, where the user gave none (None is none), also before the modality's own.
    assert (made.text.temperature, made.image.cfg_interval, made.seed) == (0.4, (0.2, 0.9), 52)
    assert made.image.steps == 24
    assert (made.text.top_p, made.image.cfg_text_scale) == (1.0, 4.0)


@pytest.mark.parametrize("falsy", [{"seed": 0}, {"think": False}, {"top_k": 0}, {"cfg_img_scale": 0.0}])
def test_a_users_zero_is_a_value(falsy: dict[str, Any]) -> None:
    [(name, value)] = falsy.items()
    made = request(Modality.IMG2IMG, {name: 1}, **falsy)
    [found] = [getattr(part, name) for part in (made, made.text, made.image) if hasattr(part, name)]
    assert found == value and found is not True


def test_a_seed_is_drawn_when_nobody_gives_one() -> None:
    seeds = {request().seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


BAD: list[tuple[str, list[Any]]] = [
    ("steps", [1, 0, 1001, 2.0, True, "50"]),
    ("timestep_shift", [0, -1.0, 100.5, float("inf"), float("nan"), "3"]),
    ("cfg_text_scale", [-0.1, 100.5, float("nan"), "4"]),
    ("cfg_img_scale", [-0.1, 100.5, float("inf")]),
    ("cfg_renorm_min", [-0.1, 1.1]),
    ("cfg_renorm_type", ["local", "", 3]),
    ("cfg_interval", [(0.9, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.4,), 0.4, ("a", "b"), (0.0, 0.5, 1.0)]),
    ("height", [15, 0, 512.0]),
    ("width", [15, -512, "512"]),
    ("temperature", [-0.1, float("inf"), float("nan"), "hot", True, 100.5, 1e300]),
    ("top_p", [0, -0.5, 1.01, float("nan")]),
    ("top_k", [-1, 1.5, True, 2**32]),
    ("repetition_penalty", [0, -1, float("inf"), float("nan"), 5e-324, 1e-39, 0.0099, 100.1, 1e39]),
    ("max_tokens", [0, -1]),
    ("stop_token_ids", [(5, -1), (0.5,)]),
    ("seed", [-1, 2**63, 1.0, "7"]),
    ("posterior", ["median", ""]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_what_is_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} is .*must") as caught:
        request(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_think_tokens", 0),
        ("max_think_tokens", 2.5),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "many"),
        ("stop_token_ids", 5),
        ("do_sample", "no"),
        ("think", "no"),
        ("negative_prompt", 5),
        pytest.param("temperature", 10**400, id="temperature-huge"),
    ],
)
def test_what_is_no_value_at_all_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(**{name: value})
    assert caught.value.field == name


SAMPLED = {"think": True, "do_sample": True}


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2, "cfg_text_scale": 0, "cfg_img_scale": 0, "cfg_renorm_min": 0},
        {"steps": 3, "timestep_shift": 0.001, "cfg_text_scale": 0},
        {"steps": 3, "cfg_renorm_min": 1},
        {"steps": 1000, "timestep_shift": 100, "cfg_text_scale": 100, "cfg_img_scale": 100, "cfg_renorm_min": 0},
        {"cfg_interval": [0, 0], "height": 16, "width": 16, "seed": 0},
        {"cfg_interval": (1.0, 1.0), "seed": 2**63 - 1, "max_think_tokens": 1, "think": True},
        {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 0.01, "stop_token_ids": [0], "think": True},
        {"temperature": 100, "top_p": 5e-324, "top_k": 2**32 - 1, "repetition_penalty": 100, **SAMPLED},
    ],
)
def test_the_limits_themselves_are_allowed(options: dict[str, Any]) -> None:
    request(**options)


@pytest.mark.parametrize("source", ["options", "deploy"])
def test_unknown_options_are_refused_with_what_works(source: str) -> None:
    given: dict[str, Any] = {source: {"cfg_scale": 3.0, "stesp": 9, "nonsense": 1}}
    said = r"'cfg_scale'; give cfg_text_scale; .*'stesp'; did you mean steps\?; .*'nonsense'; known: .*height, .*width"
    with pytest.raises(InvalidRequest, match=said) as caught:
        resolve(Modality.TEXT2IMG, PROMPT, given.get("options", {}), given.get("deploy"))
    assert [each.field for each in (caught.value, *caught.value.also)] == ["cfg_scale", "stesp", "nonsense"]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt is empty") as caught:
        resolve(Modality.TEXT2IMG, (), {})
    assert caught.value.field == "prompt"


def test_an_error_says_the_value_seen_in_one_line() -> None:
    with pytest.raises(
        InvalidRequest, match=re.escape("steps is 1; it must be a whole number from 2 to 1000")
    ) as caught:
        request(steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("modality", REPLIES)
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 1000),
        ({"max_tokens": 5}, 5),
        ({"max_think_tokens": 7}, 7),
        ({"think": True}, 1000),
        ({"think": True, "max_tokens": 5}, 5),
        # One limit for thought and answer together, unless the answer has its own.
        ({"think": True, "max_think_tokens": 7}, 7),
        ({"think": True, "max_tokens": 5, "max_think_tokens": 7}, 12),
    ],
)
def test_how_long_a_reply_may_be(modality: Modality, options: dict[str, Any], limit: int) -> None:
    assert text_run_settings(request(modality, **options)).max_tokens == limit


def test_the_deploy_file_may_limit_replies() -> None:
    deploy = {"max_tokens": 2048}
    assert text_run_settings(request(Modality.IMG2TEXT, deploy)).max_tokens == 2048
    assert text_run_settings(request(Modality.IMG2TEXT, deploy, max_tokens=5)).max_tokens == 5
    assert text_run_settings(request(Modality.IMG2TEXT, deploy, think=True)).max_tokens == 2048


def test_no_default_loosens_a_users_limit() -> None:
    made = request(Modality.IMG2TEXT, {"max_tokens": 2048}, think=True, max_think_tokens=7)
    assert text_run_settings(made).max_tokens == 7


@pytest.mark.parametrize(
    ("modality", "prompt", "field"),
    [
        ("text2img", "a cat", "prompt"),
        ("text2img", ("a cat",), "prompt"),
        ("text2img", [TextPart("a cat")], "prompt"),
        ("text2video", (TextPart("a cat"),), "modality"),
    ],
)
def test_a_prompt_or_modality_of_another_kind_is_refused(modality: Any, prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(modality, prompt, {})
    assert caught.value.field == field


def test_a_modality_may_be_given_by_its_name() -> None:
    modality: Any = "img2img"
    assert resolve(modality, (TextPart("a cat"),), {}).image.cfg_img_scale == 1.5


@pytest.mark.parametrize("modality", PICTURES)
def test_the_text_before_a_picture_is_limited_as_a_think_text(modality: Modality) -> None:
    deploy = {"max_tokens": 5}
    made = request(modality, deploy, think=True, max_think_tokens=7, temperature=0.8, do_sample=True, top_k=3)
    assert text_run_settings(made) == TextSettings(max_tokens=7, temperature=0.8, do_sample=True, top_k=3)
    assert text_run_settings(request(modality, think=True)).max_tokens == 1000
