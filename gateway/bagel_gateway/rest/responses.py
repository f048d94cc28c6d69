"""What the endpoints answer, for the OpenAPI document: true to what they send, as the tests compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Part of an answer. What has a default may be absent."""

    # So the tests find what is answered and not documented.
    model_config = ConfigDict(extra="forbid")


class ErrorAbout(Answer):
    """What was wrong."""

    message: str
    type: Literal["invalid_request_error", "not_found_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="the parameter that is wrong")
    code: str | None


class ErrorAnswer(Answer):
    """An error, in OpenAI's form."""

    error: ErrorAbout


class TokenDetails(Answer):
    """Tokens by what they are of."""

    text_tokens: int
    image_tokens: int


class ImageUsage(Answer):
    """True token counts; the prompt counts once."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImageData(Answer):
    """One picture."""

    b64_json: str
    seed: int
    think_text: str = Field("", description="only of a picture that was thought about")


class ImagesAnswer(Answer):
    """Pictures, or edits."""

    created: int
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="absent where the timesteps are the default or were given"
    )
    size: str = Field(pattern="^[0-9]+x[0-9]+$")
    safety_identifier: str = ""
    data: list[ImageData]
    usage: ImageUsage


class ImageUrl(Answer):
    """A picture as a data URL."""

    url: str


class ImagePart(Answer):
    """A picture of a chat."""

    type: Literal["image_url"]
    index: int
    image_url: ImageUrl


class Message(Answer):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    images: list[ImagePart] = Field([], description="of a chat that was asked for a picture")


class Choice(Answer):
    """One of n answers."""

    index: int
    message: Message
    logprobs: None
    finish_reason: Literal["stop", "length"]


class PromptDetails(Answer):
    """What of the prompt was there already."""

    cached_tokens: int


class ChatUsage(Answer):
    """True token counts; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatAnswer(Answer):
    """A chat completion."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: ChatUsage


class Model(Answer):
    """A served model, or an alias of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="the model's own name")


class ModelList(Answer):
    """The served model under its name, then its aliases."""

    object: Literal["list"]
    data: list[Model]


_ERRORS: Mapping[int, str] = {
    400: "a parameter or the body is wrong; `param` names it",
    401: "no API key that this gateway knows, where it asks for one",
    404: "a model that is not served; the message lists those that are",
    413: "the body is larger than the gateway reads",
    415: "the body is of another media type",
    429: "no place within the gateway's batch timeout; Retry-After says when to try again",
    500: "a bug, or K/V that were lost; the log has the details",
    501: "not built in this version, as an edit where the Thinker only understands",
    503: "it drains, a stage has no service that is ready, or one was lost under the request",
    504: "K/V did not come in time",
}
MODELS = (401, 404, 500, 503)
WORK = tuple(_ERRORS)

Responses = dict[int | str, dict[str, Any]]


def responses(answer: type[Answer] | None, errors: tuple[int, ...], *, streams: bool = False) -> Responses:
    """An operation's answers. answer: its body where it is JSON; streams: it may be server-sent events too."""
    documented: Responses = {code: {"model": ErrorAnswer, "description": _ERRORS[code]} for code in errors}
    if 429 in documented:
        documented[429]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    if answer is not None:
        documented[200] = {"model": answer, "description": "the answer"}
        if streams:
            text = {"schema": {"type": "string"}}
            documented[200] |= {"content": {"text/event-stream": text}, "description": "the answer, or events of it"}
    return documented
