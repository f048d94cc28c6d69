"""How a request is read and answered: as docs/rest.md says, or as vllm-omni's clients expect it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response

from bagel.effect import effective
from bagel.errors import InvalidRequest
from bagel.prompts import TextPart
from bagel.request import SIZE_STRIDE, Modality, RenormType, resolve
from bagel.telemetry.logs import Log
from bagel_gateway.rest.answers import Payload
from bagel_gateway.rest.compat import Body, translate
from bagel_gateway.rest.parameters import ChatParameters, Parameters, refuse_undrawn
from bagel_gateway.serving import Requests

NOTES = "X-Bagel-Notes"
"""The header that says which settings of a request have no effect, or another one than they say."""
GUIDANCE: Mapping[str, Any] = {
    "cfg_img_scale": 1.5,
    "cfg_interval": (0.4, 1.0),
    "cfg_renorm_type": RenormType.GLOBAL,
}
"""vllm-omni's guidance, of pictures and edits alike, where it differs from ours."""
_GIVEN_OUT = ("output_format", "output_compression", "partial_images")
"""Settings of the answer, which are no options of bagel.request."""
_LONGEST = 4000

P = TypeVar("P", bound=Parameters)

log = Log("bagel_gateway.rest")


class Reading:
    """One request by docs/rest.md: nothing of it is changed.

    urls: form fields that are URLs of images. as_file: a picture is answered as its file.
    """

    urls: Sequence[str] = ()
    as_file = False

    def __init__(self) -> None:
        self.notes: list[str] = []
        """What the answer's header says."""

    def body(self, body: Body) -> Body:
        """The body with this gateway's names."""
        return body

    async def settings(
        self, given: P, options: Mapping[str, Any], modality: Modality, names: Mapping[str, str]
    ) -> tuple[P, Mapping[str, Any]]:
        """The settings to serve the request with. names: the client's, by those of bagel.request."""
        if isinstance(given, ChatParameters) and not given.makes_image:
            refuse_undrawn(given, options)
        return given, options

    def completion(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A chat's answer."""
        return answer

    def chunks(self, payloads: AsyncGenerator[Payload, None], *, draws: bool) -> AsyncGenerator[Payload, None]:
        """A chat's answer as a stream."""
        return payloads

    def noted(self, response: Response) -> Response:
        """The response, with the notes in its header."""
        if self.notes:
            log.info("noted", notes=self.notes)
            notes = "; ".join(self.notes).encode("ascii", "backslashreplace").decode()
            response.headers[NOTES] = "".join(letter if letter.isprintable() else " " for letter in notes)[:_LONGEST]
        return response


class OmniReading(Reading):
    """One request of a vllm-omni client; bagel_gateway.rest.compat has the table."""

    urls = ("url",)

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self._requests = requests

    def body(self, body: Body) -> Body:
        """The body with this gateway's names, parts and texts."""
        self.notes += translate(body)
        if body.get("response_format") == "file":
            self.as_file = True
            del body["response_format"]
            if body.get("stream") or body.get("n", 1) not in (1, "1"):
                raise InvalidRequest("response_format", "a file is one picture; leave stream and n out")
        return body

    async def settings(
        self, given: P, options: Mapping[str, Any], modality: Modality, names: Mapping[str, str]
    ) -> tuple[P, Mapping[str, Any]]:
        """Settings without effect are noted, a size is made to fit, and guidance is vllm-omni's by default."""
        largest = (await self._requests.describe()).model.max_image_size
        wanted = {name: value for name, value in options.items() if value is not None}
        wanted = self._fitted(wanted, largest) if modality.makes_image else wanted
        defaults = {**self._guidance(modality), **self._requests.defaults}
        try:
            # Any text will do, as which settings have an effect does not depend on it.
            request = resolve(modality, (TextPart("-"),), {}, {**defaults, **wanted})
        except InvalidRequest:  # the planning refuses it, by the client's name
            return given, wanted
        given_out = {name: value for name in _GIVEN_OUT if (value := getattr(given, name)) is not None}
        pillow = (given.output_format or "png").upper()
        asked = {**wanted, **given_out, "output_format": pillow}
        kept = effective(request, {**self._guidance(modality), **asked}, pillow)
        dropped = [name for name in asked if name not in kept]
        shown = dict.fromkeys(names.get(name, name) for name in dropped)  # do_sample may follow from a temperature
        self.notes += [f"{name} has no effect on this request" for name in shown if name in given.model_fields_set]
        given = given.model_copy(update={name: None for name in dropped if name in _GIVEN_OUT})
        return given, {name: value for name, value in kept.items() if name not in _GIVEN_OUT}

    def completion(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Pictures are parts of the content, those of all results in one choice."""
        messages = [choice["message"] for choice in answer["choices"]]
        if not all("images" in message for message in messages):
            return answer
        parts = [{**part, "index": at} for at, message in enumerate(messages) for part in message["images"]]
        message: dict[str, Any] = {"role": "assistant", "content": parts, "refusal": None}
        if thoughts := [message["content"] for message in messages if message["content"]]:
            message["reasoning_content"] = "\n\n".join(thoughts)
        return {**answer, "choices": [{**answer["choices"][0], "message": message}]}

    async def chunks(self, payloads: AsyncGenerator[Payload, None], *, draws: bool) -> AsyncGenerator[Payload, None]:
        """Each chunk says its modality. Pictures are parts of the content, and the text before one is reasoning."""
        async with aclosing(payloads):
            async for payload in payloads:
                yield payload if isinstance(payload, str) else _chunk(payload, draws=draws)

    def _guidance(self, modality: Modality) -> dict[str, Any]:
        """vllm-omni's defaults, where the deployment has none of its own."""
        own = self._requests.defaults
        return {name: value for name, value in GUIDANCE.items() if modality.makes_image and name not in own}

    def _fitted(self, options: dict[str, Any], largest: int) -> dict[str, Any]:
        """The options with sides that the model has: as large as it can be in the shape that was asked for."""
        width, height = options.get("width"), options.get("height")
        if width is None or height is None or max(width, height) <= largest:
            return options
        small = [max(SIZE_STRIDE, side * largest // max(width, height)) for side in (width, height)]
        self.notes.append(f"size {width}x{height} is above the model's largest, {largest}: {small[0]}x{small[1]}")
        return {**options, "width": small[0], "height": small[1]}


def _chunk(payload: Mapping[str, Any], *, draws: bool) -> Mapping[str, Any]:
    choices = []
    for choice in payload["choices"]:
        delta = dict(choice["delta"])
        if draws and delta.get("content"):
            delta["reasoning_content"] = delta.pop("content")
        if "images" in delta:
            delta["content"] = delta.pop("images")
        choices.append({**choice, "delta": delta})
    return {**payload, "choices": choices, "modality": "image" if draws else "text"}
