"""/v1/images: pictures from a prompt, and edits of one to seven images as one context."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bagel.errors import InvalidRequest
from bagel.request import Modality
from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.rest.answers import Payload, event_stream, unless_gone
from bagel_gateway.rest.bodies import Bodies
from bagel_gateway.rest.parameters import (
    REFUSED_EDIT,
    REFUSED_GENERATION,
    ImageParameters,
    options_of,
    read,
)
from bagel_gateway.rest.serve import (
    Events,
    Front,
    Outcome,
    base64_of,
    check_images,
    image_part,
    image_tokens,
    outcomes,
    text_part,
)

_NAMES = {"max_tokens": "max_think_tokens"}


class Images:
    """The two endpoints."""

    def __init__(self, front: Front, bodies: Bodies) -> None:
        self._front, self._bodies = front, bodies

    async def generate(self, request: Request) -> Response:
        """Draw n pictures."""
        data = await self._bodies.read_json(request)
        return await self._answer(request, read(ImageParameters, REFUSED_GENERATION, data, typed=True), ())

    async def edit(self, request: Request) -> Response:
        """Edit images: those of one request are one interleaved context, before the prompt."""
        known = (*ImageParameters.model_fields, *REFUSED_EDIT)
        fields, images = await self._bodies.read_form(request, ("image",), known, REFUSED_EDIT)
        given = read(ImageParameters, REFUSED_EDIT, fields, typed=False)
        if not images:
            raise InvalidRequest("image", "image is missing; send one or several image files")
        check_images(len(images), "image", self._front.max_images)
        return await self._answer(request, given, images)

    async def _answer(self, request: Request, given: ImageParameters, images: Sequence[bytes]) -> Response:
        options = options_of(given)
        await self._front.check_model(given.model)
        stride = (await self._front.requests.describe()).model.latent_stride
        modality = Modality.IMG2IMG if images else Modality.TEXT2IMG
        parts = [*map(image_part, images), text_part(given.prompt)]
        events = self._front.events(given, modality, parts, options, _NAMES)
        if given.stream:
            name = "image_edit" if images else "image_generation"
            return await event_stream(request, _stream(name, given, events, stride))
        results = await unless_gone(request, outcomes(events, given.count))
        return JSONResponse(_response(given, results, stride))


def _response(given: ImageParameters, results: list[Outcome], stride: int) -> dict[str, Any]:
    """OpenAI's ImagesResponse. seed, and the text of a picture that was thought about, are of our own."""
    data = []
    for result in results:
        item = {"b64_json": base64_of(result.picture.data), "seed": result.accepted.seed}
        data.append(item | ({"think_text": result.finished.text} if result.finished.text else {}))
    return {
        "created": int(time.time()),
        **_about(given, results[0]),
        **({"quality": given.told_quality} if given.told_quality else {}),  # no answer's type has "auto"
        **_identified(given),
        "data": data,
        "usage": usage(results, stride),
    }


def usage(results: Sequence[Outcome], stride: int) -> dict[str, Any]:
    """True token counts: the prompt once, as it is read once; latent tokens and think texts of all pictures."""
    text, image = results[0].usage.prompt_tokens, results[0].usage.image_tokens
    drawn = sum(image_tokens(result, stride) for result in results)
    thought = sum(result.usage.think_tokens for result in results)
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": drawn + thought,
        "output_tokens_details": {"image_tokens": drawn, "text_tokens": thought},
        "total_tokens": text + image + drawn + thought,
    }


async def _stream(name: str, given: ImageParameters, events: Events, stride: int) -> AsyncGenerator[Payload, None]:
    """OpenAI's events; `index` says which of n where there are several."""
    results = [Outcome() for _ in range(given.count)]
    async with aclosing(events):
        async for number, event in events:
            result = results[number]
            result.take(event)
            told = _event(name, given, result, event, stride)
            if told is not None:
                yield {**told, "index": number} if given.count > 1 else told


def _event(
    name: str, given: ImageParameters, result: Outcome, event: gateway_pb2.GenerateResponse, stride: int
) -> dict[str, Any] | None:
    """What a client of the stream is told of an event, if anything."""
    match event.WhichOneof("event"):
        case "preview":
            told = _told(f"{name}.partial_image", given, result, event.preview.picture)
            return {**told, "partial_image_index": event.preview.index}
        case "finished":
            told = _told(f"{name}.completed", given, result, result.picture)
            thought = {"think_text": result.finished.text} if result.finished.text else {}
            return {
                **told,
                "usage": usage([result], stride),
                "seed": result.accepted.seed,
                **thought,
                **_identified(given),
            }
        case "step" if given.progress:
            return {"type": f"{name}.progress", "step": event.step.step, "steps": event.step.steps}
        case "text" if given.progress:
            return {"type": f"{name}.think_text.delta", "delta": event.text.text}
    return None


def _told(type_: str, given: ImageParameters, result: Outcome, picture: common_pb2.Picture) -> dict[str, Any]:
    return {
        "type": type_,
        "b64_json": base64_of(picture.data),
        "created_at": int(time.time()),
        **_about(given, result),
        "quality": given.told_quality or "auto",
    }


def _about(given: ImageParameters, result: Outcome) -> Mapping[str, str]:
    return {"background": "opaque", "output_format": given.output_format or "png", "size": result.size}


def _identified(given: ImageParameters) -> Mapping[str, str]:
    identifier = given.safety_identifier or given.user
    return {"safety_identifier": identifier} if identifier else {}
