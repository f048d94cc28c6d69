"""Every parameter of the REST front: what it may be, what it becomes, or why it is refused. None is ignored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from bagel.effect import UNDRAWN, UNHEARD
from bagel.errors import InvalidRequest, together
from bagel.images.output import MAX_PREVIEWS, OutputFormat
from bagel.ranges import in_words
from bagel.request import MAX_STOP_TOKENS, RenormType
from bagel.rpc import convert
from bagel.v1 import common_pb2, gateway_pb2
from bagel.vocabulary import REST_INSTEAD, WRAPPERS, control_mark_problems, instead_of
from bagel_gateway.rest.errors import UnknownParameter, renamed

MAX_N = 10

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class Only:
    """A parameter of which these values alone can be honoured, as they ask for what is done anyway."""

    values: tuple[object, ...]
    why: str

    def refused(self, name: str, value: object) -> list[InvalidRequest]:
        """An error for another value; null is none."""
        if value is None or value in self.values:
            return []
        allowed = ", ".join(map(repr, self.values))
        instead = f"; leave it out, or send {allowed}" if self.values else "; leave it out"
        return [InvalidRequest(name, f"{name} is not supported: {self.why}{instead}")]


_NO_TOOLS = Only(([], "none", "auto"), "the model calls no tools")
_OF_IMAGES = {
    "background": Only(("auto", "opaque"), "pictures are opaque"),
    "complexity": Only(("auto",), "num_inference_steps says how much work a picture is"),
    "frame_count": Only((1,), "pictures do not move"),
    "frame_duration_ms": Only((), "pictures do not move"),
    "response_format": Only(("b64_json",), "pictures come in the answer, none is stored under a URL"),
    "style": Only((), "say it in the prompt"),
    "svg": Only((), "pictures are made of pixels"),
}
REFUSED_GENERATION: Mapping[str, Only] = {
    **_OF_IMAGES,
    "moderation": Only(("auto", "low"), "there is no moderation"),
}
REFUSED_EDIT: Mapping[str, Only] = {
    **_OF_IMAGES,
    "input_fidelity": Only((), "cfg_img_scale says how close an edit keeps to its input"),
    "markup": Only((), "say in the prompt what to change"),
    "mask": Only((), "say in the prompt what to change"),
}
REFUSED_CHAT: Mapping[str, Only] = {
    "audio": Only((), "there is no sound"),
    "frequency_penalty": Only((0,), "repetition_penalty is what the model has"),
    "function_call": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "logit_bias": Only(({},), "tokens are not biased"),
    "logprobs": Only((False,), "probabilities are not given out"),
    "metadata": Only(({},), "nothing is stored"),
    "moderation": Only((), "there is no moderation"),
    "parallel_tool_calls": Only((True, False), "the model calls no tools"),
    "prediction": Only((), "nothing is predicted"),
    "presence_penalty": Only((0,), "repetition_penalty is what the model has"),
    "prompt_cache_key": Only((), "prompts are reused by their content"),
    "prompt_cache_options": Only((), "prompts are reused by their content"),
    "prompt_cache_retention": Only((), "prompts are reused by their content"),
    "reasoning_effort": Only((), "think says whether the model thinks first"),
    "response_format": Only(({"type": "text"},), "answers are plain text"),
    "service_tier": Only(("auto", "default"), "all requests are served alike"),
    "store": Only((False,), "nothing is stored"),
    "tool_choice": _NO_TOOLS,
    "tools": _NO_TOOLS,
    "top_logprobs": Only((0,), "probabilities are not given out"),
    "verbosity": Only(("medium",), "max_tokens bounds an answer"),
    "web_search_options": Only((), "the model searches nothing"),
}


Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
QUALITY: Mapping[str, int] = {
    "low": 20,
    "medium": 35,
    "high": 50,
    "standard": 50,
    "xhigh": 75,
    "hd": 75,
    "max": 100,
}
"""Timesteps of a quality, in which high is the model's own default."""
MAX_STOPS, LONGEST_STOP = 4, 256
_ONE_STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    WithJsonSchema({"anyOf": [_ONE_STOP, {"type": "array", "maxItems": MAX_STOPS, "items": _ONE_STOP}]}),
]


class Parameters(BaseModel):
    """What every endpoint takes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="a served name, see /v1/models; the served model by default")
    n: int | None = Field(None, ge=1, le=MAX_N, description="results of one prompt, with rising seeds")
    stream: bool | None = Field(None, description="server-sent events")
    user: str | None = Field(None, max_length=512, description="written to the log with the request")
    safety_identifier: str | None = Field(None, max_length=512, description="as user; given back with pictures")
    seed: int | None = Field(None, ge=0, description="the same gives the same; drawn by default")
    think: bool | None = Field(None, description="the model thinks first, in words")
    max_think_tokens: int | None = Field(None, description="limit of the think text (1000)")
    do_sample: bool | None = Field(None, description="sample texts instead of taking the likeliest token")
    text_temperature: float | None = Field(None, description="of sampled texts, at most 100 (0.3)")
    top_p: float | None = Field(None, description="sample from the likeliest tokens of this probability (1)")
    top_k: int | None = Field(None, description="sample from so many likeliest tokens; 0 is all (0)")
    repetition_penalty: float | None = Field(None, description="above 1 discourages repeats, from 0.01 to 100 (1)")
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKENS, description="tokens that end a text")
    posterior: Literal["content", "seed", "mean"] | None = Field(None, description="noise of an edit's input")
    negative_prompt: str | None = Field(None, description="what to steer away from")
    num_inference_steps: int | None = Field(None, description="timesteps; n are n - 1 steps (50)")
    timestep_shift: float | None = Field(None, description="above 1 spends more steps at high noise (3)")
    cfg_text_scale: float | None = Field(None, description="text guidance; 1 is none (4)")
    cfg_img_scale: float | None = Field(None, description="image guidance; 1 is none (1; edits 1.5)")
    cfg_interval: list[float] | None = Field(
        None, min_length=2, max_length=2, description="when guidance is on ([0.4, 1]; edits [0, 1])"
    )
    cfg_renorm_type: Literal["global", "text_channel", "channel"] | None = Field(
        None, description="the norm that guidance keeps (global; edits text_channel)"
    )
    cfg_renorm_min: float | None = Field(None, description="lower bound of the renorm factor (0)")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto; sides are rounded down to the grid")
    output_format: Format | None = Field(None, description="png, jpeg or webp (png)")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp (95)")
    partial_images: int | None = Field(None, ge=0, le=MAX_PREVIEWS, description="previews in a stream (0)")

    @property
    def count(self) -> int:
        """Results wanted."""
        return self.n or 1


class ImageParameters(Parameters):
    """What an images endpoint takes; of an edit the images come beside it."""

    prompt: str = Field(description="what to draw, or what to change")
    progress: bool | None = Field(None, description="steps and think text in a stream, as events of our own")
    quality: Quality | None = Field(None, description="timesteps by a name; num_inference_steps goes before it")

    @property
    def answered_quality(self) -> str | None:
        """The quality by one of the names that OpenAI's clients know in an answer; None if none was used."""
        if self.num_inference_steps is not None or self.quality is None:
            return None
        return {"auto": None, "standard": "high", "hd": "xhigh"}.get(self.quality, self.quality)


class StreamOptions(BaseModel):
    """stream_options of a chat."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatParameters(Parameters):
    """What the chat endpoint takes."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=64, description="see docs/rest.md")
    modalities: list[Literal["text", "image"]] | None = Field(
        None, min_length=1, max_length=2, description='["image"] draws or edits; text by default'
    )
    max_tokens: int | None = Field(None, description="limit of an answer (1000)")
    max_completion_tokens: int | None = Field(None, description="the same")
    temperature: float | None = Field(None, description="0 is greedy; above 0 samples")
    stop: Stops | None = Field(None, max_length=MAX_STOPS, description="a text that ends an answer, or up to four")
    interleave: bool | None = Field(
        None, description="images and texts of a user's message in the order given (images first)"
    )
    stream_options: StreamOptions | None = None

    @property
    def makes_image(self) -> bool:
        """Whether a picture is wanted."""
        return "image" in (self.modalities or ())


P = TypeVar("P", bound=Parameters)

_OPTIONS = {
    "seed": "seed",
    "think": "think",
    "max_think_tokens": "max_think_tokens",
    "posterior": "posterior",
    "num_inference_steps": "steps",
    "timestep_shift": "timestep_shift",
    "cfg_text_scale": "cfg_text_scale",
    "cfg_img_scale": "cfg_img_scale",
    "cfg_interval": "cfg_interval",
    "cfg_renorm_type": "cfg_renorm_type",
    "cfg_renorm_min": "cfg_renorm_min",
    "negative_prompt": "negative_prompt",
    "do_sample": "do_sample",
    "text_temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "stop_token_ids": "stop_token_ids",
}
FIELD_NAMES = {"steps": "num_inference_steps", "temperature": "text_temperature", "height": "size", "width": "size"}
"""Parameters by the fields of bagel.request, where they are not the same."""


def read(model: type[P], refused: Mapping[str, Only], data: Mapping[str, Any], *, typed: bool) -> P:
    """Parameters from a body. typed: the body has types, as JSON does and a form does not.

    Raises InvalidRequest with everything that is wrong, or UnknownParameter if a name is wrong.
    """
    given = dict(data)
    # Taken out here, since the model below would call them unknown.
    refusals = [error for name, only in refused.items() for error in only.refused(name, given.pop(name, None))]
    try:
        read = model.model_validate(given, strict=typed)
    except ValidationError as error:
        found = [(each["type"] == "extra_forbidden", each) for each in error.errors(include_url=False)]
        # Unknown names first: what is missing is often misspelt.
        unknown = [one for new, each in found if new for one in _unknown(model, _name(each), each["input"])]
        others = [_problem(model, each) for new, each in found if not new]
        texts = [(name, given.get(name)) for name in ("prompt", "negative_prompt")]
        marked = [one for name, text in texts if isinstance(text, str) for one in control_mark_problems(name, [text])]
        raise together([*unknown, *refusals, *others, *marked]) from None
    if refusals:
        raise together(refusals)
    return read


def _name(error: ErrorDetails) -> str:
    return ".".join(str(key) for key in error["loc"])[:_LONGEST_NAME]


def _unknown(model: type[BaseModel], name: str, value: object) -> list[InvalidRequest]:
    """A parameter that there is not, and those of its object if it wraps some."""
    instead = instead_of(name, REST_INSTEAD, model.model_fields)
    hint = f": {instead}" if instead else "; docs/rest.md lists them"
    problems: list[InvalidRequest] = [UnknownParameter(name, f"{name} is no parameter of this endpoint{hint}")]
    if name in WRAPPERS and isinstance(value, dict):
        inner = [(str(key)[:_LONGEST_NAME], each) for key, each in value.items() if key not in model.model_fields]
        problems += [problem for key, each in inner for problem in _unknown(model, key, each)]
    return problems


def _problem(model: type[BaseModel], error: ErrorDetails) -> InvalidRequest:
    """One of pydantic's errors in our words."""
    name = _name(error)
    if error["type"] == "missing":
        return InvalidRequest(name, f"{name} is missing; it is required")
    if error["type"] in ("too_long", "too_short"):
        bound, end = ("at most", "max_length") if error["type"] == "too_long" else ("at least", "min_length")
        length = f"{name} has {len(error['input'])} entries; it must have {bound} {error['ctx'][end]}"
        return InvalidRequest(name, length)
    wanted = f"; it must be {_range(model, name)}" if error["type"] in _BOUNDS else f": {error['msg']}"
    return InvalidRequest(name, f"{name} is {error['input']!r:.80}{wanted}")


_BOUNDS = ("greater_than_equal", "less_than_equal")
_LONGEST_NAME = 200
"""The longest name of a parameter in a message, since a client may make up one as long as a body."""


def _range(model: type[BaseModel], name: str) -> str:
    """What a number must be: both ends, whichever was passed."""
    ends = {type(each).__name__.lower(): each for each in model.model_fields[name].metadata}
    at_least, at_most = (getattr(ends.get(end), end, None) for end in ("ge", "le"))
    return f"a whole number {in_words(at_least=at_least, at_most=at_most)}"


def generate_request(given: Parameters, request: common_pb2.Request) -> gateway_pb2.GenerateRequest:
    """The request with how its picture is given out."""
    message = gateway_pb2.GenerateRequest(request=request)
    output = OutputFormat(given.output_format or "png", given.output_compression, given.partial_images or 0)
    convert.output_to_wire(output, message)
    return message


def options_of(given: Parameters) -> dict[str, Any]:
    """What was given, as options of bagel.request, which refuses what has no effect on the request.

    Raises InvalidRequest for settings that contradict each other, and for previews and progress without a stream.
    """
    if not given.stream:
        UNHEARD.refuse(given.model_dump(exclude_none=True))
    options: dict[str, Any] = {option: getattr(given, name) for name, option in _OPTIONS.items()}
    if given.cfg_renorm_type is not None:
        options["cfg_renorm_type"] = RenormType(given.cfg_renorm_type)
    options["width"], options["height"] = _size(given.size)
    # Timesteps that were given go before a quality.
    if isinstance(given, ImageParameters) and options["steps"] is None:
        options["steps"] = QUALITY.get(given.quality or "auto")
    if isinstance(given, ChatParameters):
        if given.makes_image and given.stop:
            raise InvalidRequest("stop", "stop has no effect on a picture; leave it out")
        options["max_tokens"] = _limit(given)
        options |= _temperature(given)
    if given.do_sample is None and options.get("do_sample") is None and options["temperature"] != 0:
        # OpenAI's clients have no do_sample: a limit that leaves something to choose from says it.
        options["do_sample"] = True if _chooses(given) else None
    return options


def refuse_undrawn(given: ChatParameters, options: Mapping[str, Any]) -> None:
    """Refuse what says how to draw in a chat that does not ask for a picture; raises InvalidRequest."""
    output = {"output_format": (given.output_format or "png").upper(), "output_compression": given.output_compression}
    try:
        UNDRAWN.refuse({**options, **output}, 'send modalities: ["image"] to draw, or leave it out')
    except InvalidRequest as error:
        raise renamed(error, FIELD_NAMES) from None


def _chooses(given: Parameters) -> bool:
    return given.top_p not in (None, 1) or bool(given.top_k)


def _limit(given: ChatParameters) -> int | None:
    """The limit of an answer under either name."""
    if given.max_tokens is not None and given.max_completion_tokens not in (None, given.max_tokens):
        raise InvalidRequest("max_tokens", "max_tokens and max_completion_tokens are one limit; send one of them")
    return given.max_completion_tokens if given.max_tokens is None else given.max_tokens


def _temperature(given: ChatParameters) -> dict[str, Any]:
    """OpenAI's temperature says whether to sample, too."""
    if given.temperature is None:
        return {}
    if given.text_temperature is not None or given.do_sample not in (None, given.temperature > 0):
        raise InvalidRequest("temperature", "temperature says it all; leave text_temperature and do_sample out")
    return {"temperature": given.temperature, "do_sample": given.temperature > 0}


def _size(size: str | None) -> tuple[int | None, int | None]:
    """(width, height) in pixels, None for the model's."""
    if size is None or size == "auto":
        return None, None
    if not (match := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)):
        raise InvalidRequest("size", f"size is {size!r:.80}; write WIDTHxHEIGHT, like 1024x768, or auto")
    return int(match[1]), int(match[2])
