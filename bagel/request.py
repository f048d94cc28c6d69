"""What a user asks for: one request, its settings, their defaults and limits. No torch here.

Precedence (docs/options.md): the user's value, the deploy file's
default_sampling_params, the tables below. Where the reference's default depends on the modality,
`resolve` fills it in.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from types import UnionType
from typing import Any, TypeVar

from bagel.effect import Facts, check_effect
from bagel.errors import InvalidRequest, together
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.ranges import in_words
from bagel.vocabulary import control_mark_problems, refuse_unknown_options

MAX_SEED = 2**63 - 1
SIZE_STRIDE = 16
MAX_STEPS = 1000
MAX_SCALE = 100.0
MAX_TEMPERATURE = 100.0
PENALTIES = (0.01, 100.0)
"""Of a repetition. Far smaller or larger ones leave float32, in which all logits are then equal or none is a number."""
MAX_FIELD = 2**32 - 1
"""What a field of the wire for a whole number holds, that of a seed aside."""
MAX_PARTS = 64
MAX_STOP_TOKENS = 64
MAX_TEXT_BYTES = 2**20
"""UTF-8 of a prompt's texts and of the negative prompt: several times what any model has positions for."""

E = TypeVar("E", bound=StrEnum)


class Modality(StrEnum):
    """What goes in and what comes out."""

    TEXT2IMG = "text2img"
    IMG2IMG = "img2img"
    IMG2TEXT = "img2text"
    TEXT2TEXT = "text2text"

    @property
    def makes_image(self) -> bool:
        return self in (Modality.TEXT2IMG, Modality.IMG2IMG)

    @property
    def reads_image(self) -> bool:
        return self in (Modality.IMG2IMG, Modality.IMG2TEXT)


class RenormType(StrEnum):
    """How a guided velocity is scaled back to the norm of the unguided one."""

    GLOBAL = "global"
    TEXT_CHANNEL = "text_channel"
    CHANNEL = "channel"


class PosteriorMode(StrEnum):
    """Where the noise of an input image's VAE posterior comes from.

    content: a generator seeded by the digest of the resized pixels; seed: the request's generator,
    before the initial noise (the reference's order); mean: no noise.
    """

    CONTENT = "content"
    SEED = "seed"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How text is decoded. Limits count visible tokens. A temperature of 0 is greedy."""

    do_sample: bool = False
    temperature: float = 0.3
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 1000
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lowest, highest = PENALTIES
        _finite("temperature", self.temperature, at_least=0.0, at_most=MAX_TEMPERATURE)
        _finite("top_p", self.top_p, above=0.0, at_most=1.0)
        _whole("top_k", self.top_k, at_least=0, at_most=MAX_FIELD)
        _finite("repetition_penalty", self.repetition_penalty, at_least=lowest, at_most=highest)
        _token_limit("max_tokens", self.max_tokens)
        _kind("do_sample", self.do_sample, bool, "true or false")
        check_stop_tokens(len(self.stop_token_ids))
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, at_least=0)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How a picture is drawn. Scales of 1 and below switch their guidance off.

    height and width are pixels, None for the model's default (an edit: the resized input's size).
    cfg_interval is (lo, hi): guidance is on for lo < t <= hi of the shifted schedule.
    """

    steps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: RenormType = RenormType.GLOBAL
    cfg_renorm_min: float = 0.0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        _whole("steps", self.steps, at_least=2, at_most=MAX_STEPS, hint=" (n timesteps are n - 1 Euler steps)")
        _finite("timestep_shift", self.timestep_shift, at_least=0.001, at_most=MAX_SCALE)
        _finite("cfg_text_scale", self.cfg_text_scale, at_least=0.0, at_most=MAX_SCALE)
        _finite("cfg_img_scale", self.cfg_img_scale, at_least=0.0, at_most=MAX_SCALE)
        _finite("cfg_renorm_min", self.cfg_renorm_min, at_least=0.0, at_most=1.0)
        lo, hi = self.cfg_interval
        _finite("cfg_interval", lo, at_least=0.0, at_most=1.0)
        _finite("cfg_interval", hi, at_least=0.0, at_most=1.0)
        if lo > hi:
            raise InvalidRequest("cfg_interval", f"cfg_interval is {lo} {hi}; it must rise, like 0.4 1.0")
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None:
                _whole(name, size, at_least=SIZE_STRIDE)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture or one answer. Every setting has its final value; `resolve` makes it from a user's options."""

    modality: Modality
    prompt: Prompt
    seed: int
    think: bool = False
    max_think_tokens: int = 1000
    negative_prompt: str = ""
    posterior: PosteriorMode = PosteriorMode.CONTENT
    text: TextSettings = field(default_factory=TextSettings)
    image: ImageSettings = field(default_factory=ImageSettings)

    def __post_init__(self) -> None:
        _whole("seed", self.seed, at_least=0, at_most=MAX_SEED)
        _whole("max_think_tokens", self.max_think_tokens, at_least=1)
        _kind("think", self.think, bool, "true or false")
        _kind("negative_prompt", self.negative_prompt, str, "a text")
        _kind("modality", self.modality, Modality, f"one of {', '.join(Modality)}")
        _kind("prompt", self.prompt, tuple, "a tuple of TextPart and ImagePart")
        for part in self.prompt:
            _kind("prompt", part, TextPart | ImagePart, "a TextPart or an ImagePart")
        texts = [part.text for part in self.prompt if isinstance(part, TextPart)]
        check_prompt_size("prompt", len(self.prompt), texts)
        check_prompt_size("negative_prompt", 1, [self.negative_prompt])
        marked = control_mark_problems("prompt", texts)
        if marked := [*marked, *control_mark_problems("negative_prompt", [self.negative_prompt])]:
            raise together(marked)
        if not self.prompt:
            raise InvalidRequest("prompt", "the prompt is empty; give a text, like 'a large red circle'")


REFERENCE_EDIT = {"cfg_img_scale": 1.5, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": RenormType.TEXT_CHANNEL}
"""Where an edit's defaults differ from text-to-image's: the reference's interval and renorm, vllm-omni's scale."""


_OWN = ("seed", "think", "max_think_tokens", "negative_prompt", "posterior")
_LIMITS = ("max_think_tokens", "max_tokens")


def resolve(
    modality: Modality,
    prompt: Prompt,
    options: Mapping[str, Any],
    deploy_defaults: Mapping[str, Any] | None = None,
) -> Request:
    """Fill a request from a user's options (names of the dataclasses' fields; None means not given).

    deploy_defaults is the deploy file's default_sampling_params. An unknown option, a value out of range, or an option
    that has no effect on this request (bagel.effect) raises InvalidRequest. A seed that nobody gave is drawn.
    """
    modality = _choice("modality", modality, Modality)
    defaults, options = _present(deploy_defaults or {}), _present(options)
    if not options.keys().isdisjoint(_LIMITS):  # the user's limits stand alone: no default may loosen them
        defaults = {name: value for name, value in defaults.items() if name not in _LIMITS}
    given = {**defaults, **options}
    given.pop("detokenize", None)  # text is always given back as text; the deploy parser accepts nothing else
    known = _names(TextSettings) | _names(ImageSettings) | (_names(Request) - {"modality", "prompt", "text", "image"})
    refuse_unknown_options(given, known)
    given = {name: _converted(name, value) for name, value in given.items()}
    own = {"seed": secrets.randbits(31), **{name: given[name] for name in _OWN if name in given}}
    text = TextSettings(**{**_pick(given, TextSettings), "max_tokens": _reply_limit(modality, given)})
    edit = REFERENCE_EDIT if modality is Modality.IMG2IMG else {}
    image = ImageSettings(**{**edit, **_pick(given, ImageSettings)})
    request = Request(modality=modality, prompt=prompt, text=text, image=image, **own)
    check_effect(Facts(request), options)
    return request


def with_settings(request: Request, settings: Mapping[str, Any]) -> Request:
    """The request with other settings, named as its fields are: with those that a service says it used."""
    own = {name: settings[name] for name in _OWN if name in settings}
    text = replace(request.text, **_pick(settings, TextSettings))
    image = replace(request.image, **_pick(settings, ImageSettings))
    return replace(request, text=text, image=image, **own)


def check_option(name: str, value: Any) -> None:
    """Refuse what no request may have as this setting, whatever its others are; InvalidRequest says what may be."""
    value = _converted(name, value)
    if name in _names(TextSettings):
        TextSettings(**{name: value})
    elif name in _names(ImageSettings):
        ImageSettings(**{name: value})
    elif name in _OWN:
        own: dict[str, Any] = {"seed": 0, name: value}
        Request(modality=Modality.TEXT2IMG, prompt=(TextPart("-"),), **own)


def check_prompt_size(field: str, parts: int, texts: Sequence[str]) -> None:
    """Refuse what no model has positions for before time is spent on it; raises InvalidRequest."""
    if parts > MAX_PARTS:
        raise InvalidRequest(field, f"{field} has {parts} parts; it may have {MAX_PARTS}")
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(field, f"{field} has {size} bytes of text; it may have {MAX_TEXT_BYTES}")


def check_stop_tokens(count: int) -> None:
    """Refuse more stop tokens than anybody needs; raises InvalidRequest."""
    if count > MAX_STOP_TOKENS:
        raise InvalidRequest("stop_token_ids", f"stop_token_ids has {count} ids; it may have {MAX_STOP_TOKENS}")


def text_settings(request: Request) -> TextSettings:
    """Settings of the text run of this request: the think text before a picture, else the reply."""
    if request.modality.makes_image:
        return replace(request.text, max_tokens=request.max_think_tokens)
    return request.text


def _reply_limit(modality: Modality, given: Mapping[str, Any]) -> int:
    """Visible tokens of a reply. The reference has one limit for think text and answer together, so
    max_think_tokens alone bounds both; with a max_tokens beside it their sum does."""
    limits: dict[str, int] = {name: given[name] for name in _LIMITS if name in given}
    for name, value in limits.items():
        _token_limit(name, value)
    think_limit, limit = limits.get("max_think_tokens"), limits.get("max_tokens")
    if limit is None:
        return think_limit or TextSettings.max_tokens
    if given.get("think") and think_limit is not None and not modality.makes_image:
        return min(limit + think_limit, MAX_FIELD)  # far more than any context either way
    return limit


def _names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _pick(given: Mapping[str, Any], cls: type) -> dict[str, Any]:
    return {name: given[name] for name in _names(cls) if name in given}


def _converted(name: str, value: Any) -> Any:
    """A user's value as the type of its setting; InvalidRequest if it cannot be one."""
    match name:
        case "cfg_interval":
            return _pair(name, value)
        case "cfg_renorm_type":
            return _choice(name, value, RenormType)
        case "posterior":
            return _choice(name, value, PosteriorMode)
        case "stop_token_ids":
            _kind(name, value, list | tuple, "a list of token ids")
            return tuple(value)
    return value


def _choice(name: str, value: object, kind: type[E]) -> E:
    try:
        return kind(str(value))
    except ValueError:
        choices = ", ".join(kind)
        raise InvalidRequest(name, f"{name} is {str(value)!r}; it must be one of {choices}") from None


def _pair(name: str, value: Any) -> tuple[float, float]:
    try:
        lo, hi = value
        return float(lo), float(hi)
    except (TypeError, ValueError):
        raise InvalidRequest(name, f"{name} is {value!r}; it must be two numbers, like 0.4 1.0") from None


def _finite(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """Check a real number; raises InvalidRequest with the allowed range."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    too_low = number and ((above is not None and value <= above) or (at_least is not None and value < at_least))
    if not number or too_low or (at_most is not None and value > at_most):
        wanted = in_words(above=above, at_least=at_least, at_most=at_most)
        raise InvalidRequest(name, f"{name} is {value!r:.80}; it must be a number {wanted}")


def _kind(name: str, value: object, kind: type | UnionType, wanted: str) -> None:
    """Check a value's type; raises InvalidRequest with what it must be."""
    if not isinstance(value, kind):
        raise InvalidRequest(name, f"{name} is {value!r}; it must be {wanted}")


def _token_limit(name: str, value: int) -> None:
    """Check a limit of a text; raises InvalidRequest for one that is no whole number from 1 to MAX_FIELD."""
    _whole(name, value, at_least=1)
    if value > MAX_FIELD:
        raise InvalidRequest(name, f"{name} is {value!r:.80}; the largest number it takes is {MAX_FIELD}")


def _whole(name: str, value: int, *, at_least: int, at_most: int | None = None, hint: str = "") -> None:
    """Check a whole number; raises InvalidRequest with the allowed range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        wanted = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise InvalidRequest(name, f"{name} is {value!r:.80}; it must be a whole number {wanted}{hint}")
