"""Settings that have no effect beside another setting: one table for every front. No torch here.

A setting takes effect or is refused. Only the user's own settings count: defaults, also those of a deploy file, ask for
nothing. A value that switches its own setting off (`NEUTRAL`) asks for nothing either, since some clients send every
field. docs/options.md prints them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bagel.errors import InvalidRequest, together
from bagel.guidance import guided_anywhere
from bagel.prompts import ImagePart

if TYPE_CHECKING:  # bagel.request checks by this table
    from bagel.request import Request

GREEDY_BELOW = 1.1754943508222875e-38
"""Temperatures below float32's smallest normal number are 0 to the sampler."""
_LEAVE = "leave it out"
_GUIDED = ("negative_prompt", "cfg_img_scale", "cfg_renorm_type", "cfg_renorm_min")
_DRAWN = ("steps", "timestep_shift", "cfg_text_scale", "cfg_interval", *_GUIDED, "height", "width")
_WRITTEN = ("max_think_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop_token_ids", "do_sample")
_GIVEN_OUT = ("output_format", "output_compression", "partial_images")


@dataclass(frozen=True)
class Facts:
    """The input of a rule: the request with all defaults, and the names of the settings that the user gave.

    output_format: Pillow's name for it; streams: whether the caller receives events before the result.
    """

    request: Request
    given: frozenset[str] = frozenset()
    output_format: str = "PNG"
    streams: bool = True


@dataclass(frozen=True)
class Rule:
    """Settings, and when they have no effect: `when` completes the words "has no effect", `holds` says it in code."""

    settings: tuple[str, ...]
    when: str
    holds: Callable[[Facts], bool]
    instead: str = _LEAVE

    def refused(self, options: Mapping[str, Any], instead: str | None = None) -> list[InvalidRequest]:
        """An error for each of the rule's settings that asks for something; instead: a front's own remedy."""
        return [
            InvalidRequest(name, f"{name} has no effect {self.when}; {instead or self.instead}")
            for name in self.settings
            if asks_for_something(name, options.get(name))
        ]

    def refuse(self, options: Mapping[str, Any], instead: str | None = None) -> None:
        """Raise InvalidRequest if any of the rule's settings asks for something in these options."""
        if problems := self.refused(options, instead):
            raise together(problems)


def _draws(facts: Facts) -> bool:
    return facts.request.modality.makes_image


def _writes(facts: Facts) -> bool:
    return facts.request.think or not _draws(facts)


def _greedy(facts: Facts) -> bool:
    return facts.request.text.temperature < GREEDY_BELOW


def _edits(facts: Facts) -> bool:
    """Whether an image enters as VAE tokens."""
    # The command line checks its flags before it reads images; img2img then means an edit.
    images = [part for part in facts.request.prompt if isinstance(part, ImagePart)]
    return any(image.for_generation for image in images) if images else facts.request.modality == "img2img"


def _guides(facts: Facts) -> bool:
    return facts.request.image.cfg_text_scale > 1


def _in_no_step(facts: Facts) -> bool:
    return _draws(facts) and _guides(facts) and not guided_anywhere(facts.request.image)


UNHEARD = Rule(("partial_images", "progress"), "without a stream", lambda facts: not facts.streams,
               "leave it out, or ask for a stream (Python: give on_event)")  # fmt: skip
"""Progress and previews, for a caller who receives nothing before the result."""

UNDRAWN = Rule((*_DRAWN, *_GIVEN_OUT), "on a text answer", lambda facts: not _draws(facts),
               "leave it out, or ask for a picture")  # fmt: skip

RULES: tuple[Rule, ...] = (
    UNDRAWN,
    Rule(("max_tokens",), "on a picture", _draws,
         "leave it out: max_think_tokens bounds the text before one"),
    Rule(_WRITTEN, "on a picture without think", lambda facts: not _writes(facts), "leave it out, or turn think on"),
    Rule(("max_think_tokens",), "on an answer without think that max_tokens bounds",
         lambda facts: not _draws(facts) and not facts.request.think and "max_tokens" in facts.given,
         "give one of the two, or turn think on"),
    Rule(("posterior",), "where no image is edited", lambda facts: not _edits(facts)),
    Rule(("temperature", "top_p", "top_k"), "without sampling", lambda facts: not facts.request.text.do_sample,
         "leave it out, or turn do_sample on"),
    Rule(("top_p", "top_k", "do_sample"), "at temperature 0, which takes the likeliest token", _greedy,
         "leave it out, or raise the temperature"),
    Rule(("temperature", "top_p"), "with top_k 1, which leaves one token", lambda facts: facts.request.text.top_k == 1,
         "leave it out, or raise top_k"),
    Rule((*_GUIDED, "cfg_interval"), "without guidance, which cfg_text_scale at most 1 switches off",
         lambda facts: not _guides(facts), "leave it out, or raise cfg_text_scale"),
    Rule(("cfg_interval",), "as it holds no timestep of the schedule", _in_no_step,
         "widen it, take more timesteps, or set cfg_text_scale to 1 for no guidance"),
    Rule(("cfg_text_scale", *_GUIDED), "as cfg_interval holds no timestep of the schedule, so that nothing is guided",
         _in_no_step, "leave it out, or widen cfg_interval"),
    Rule(("cfg_renorm_type",), "where cfg_renorm_min is 1, which is no renorm",
         lambda facts: facts.request.image.cfg_renorm_min == 1, "leave it out, or lower cfg_renorm_min"),
    Rule(("timestep_shift",), "with 2 timesteps, which are 1 and 0 however they are shifted",
         lambda facts: facts.request.image.steps == 2, "leave it out, or take more timesteps"),
    Rule(("output_compression",), "on PNG, which loses nothing", lambda facts: facts.output_format == "PNG",
         "leave it out, or choose JPEG or WEBP"),
    Rule(("partial_images",), "with 2 timesteps, whose one step ends in the picture",
         lambda facts: facts.request.image.steps == 2, "leave it out, or take more timesteps"),
    UNHEARD,
)  # fmt: skip
"""The first rule that holds for a setting refuses it."""

NEUTRAL: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("false", lambda value: not value),
    "temperature": ("0", lambda value: value < GREEDY_BELOW),
    "top_p": ("1", lambda value: value == 1),
    "top_k": ("0", lambda value: value == 0),
    "repetition_penalty": ("1", lambda value: value == 1),
    "stop_token_ids": ("none", lambda value: len(value) == 0),
    "negative_prompt": ("blank", lambda value: not value.strip()),
    "cfg_text_scale": ("at most 1", lambda value: value <= 1),
    "cfg_img_scale": ("at most 1", lambda value: value <= 1),
    "cfg_interval": ("two equal ends", lambda value: value[0] == value[1]),
    "cfg_renorm_min": ("0", lambda value: value == 0),
    "timestep_shift": ("1", lambda value: value == 1),
    "output_format": ("PNG", lambda value: value == "PNG"),
    "partial_images": ("0", lambda value: value == 0),
    "progress": ("false", lambda value: not value),
}
"""Values that ask for nothing, in words and in code. They are never refused."""


def asks_for_something(name: str, value: Any) -> bool:
    """Whether the user's value asks for an effect; None means that the user gave none."""
    return value is not None and not (name in NEUTRAL and NEUTRAL[name][1](value))


def check_effect(facts: Facts, options: Mapping[str, Any]) -> None:
    """Raise InvalidRequest with all of the user's options that would have no effect."""
    facts = replace(facts, given=facts.given | {name for name, value in options.items() if value is not None})
    wanted = {name: value for name, value in options.items() if asks_for_something(name, value)}
    problems: list[InvalidRequest] = []
    for rule in RULES:
        if not wanted.keys().isdisjoint(rule.settings) and rule.holds(facts):
            problems += rule.refused(wanted)
            wanted = {name: value for name, value in wanted.items() if name not in rule.settings}
    if problems:
        raise together(problems)


def effective(request: Request, options: Mapping[str, Any], output_format: str = "PNG") -> dict[str, Any]:
    """Reduce a full set of options, defaults included, to those that have an effect on a request.

    output_format: Pillow's name of how its picture is given out.

    A service that receives only these makes the same request, whatever its own defaults are.
    """
    facts, kept = Facts(request, frozenset(options), output_format), dict(options)
    for rule in RULES:
        for name in rule.settings:
            if asks_for_something(name, kept.get(name)) and rule.holds(facts):
                value = kept.pop(name)
                # Left out, the service's default interval could include a step; an empty one includes none.
                if name == "cfg_interval" and _in_no_step(facts):
                    kept[name] = (value[0], value[0])
    return kept


def rule_list() -> str:
    """The rules as a list for docs/options.md."""
    return "\n".join(
        textwrap.fill(f"- {_names(rule.settings)}: {rule.when}", 118, subsequent_indent="  ", break_on_hyphens=False)
        for rule in RULES
    )


def neutral_table() -> str:
    """The values that ask for nothing, as a table for docs/options.md."""
    return "\n".join(
        ["| setting | asks for nothing |", "|---|---|", *(f"| `{n}` | {w} |" for n, (w, _) in NEUTRAL.items())]
    )


def _names(settings: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in settings)
