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
from bagel_gateway.rest.dialect import Reading
from bagel_gateway.rest.fetch import Fetcher
from bagel_gateway.rest.messages import image_at
from bagel_gateway.rest.parameters import (
    FIELD_NAMES,
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

    def __init__(self, front: Front, bodies: Bodies, fetcher: Fetcher) -> None:
        self._front, self._bodies, self._fetcher = front, bodies, fetcher

    async def generate(self, request: Request) -> Response:
        """Draw n pictures."""
        reading = self._front.reading()
        body = reading.body(await self._bodies.read_json(request))
        given = read(ImageParameters, REFUSED_GENERATION, body, typed=True)
        return reading.noted(await self._answer(request, given, (), reading))

    async def edit(self, request: Request) -> Response:
        """Edit images: those of one request are one interleaved context, before the prompt."""
        reading = self._front.reading()
        known = (*ImageParameters.model_fields, *REFUSED_EDIT)
        fields, images = await self._bodies.read_form(request, ("image",), known, REFUSED_EDIT, reading.urls)
        urls = [url for name in reading.urls for url in fields.pop(name, ())]
        given = read(ImageParameters, REFUSED_EDIT, reading.body(fields), typed=False)
        if not images and not urls:
            raise InvalidRequest("image", "image is missing; send one or several image files")
        # Counted before any URL is fetched.
        check_images(len(images) + len(urls), "image", self._front.max_images)
        images += await unless_gone(request, self._fetched(urls))
        return reading.noted(await self._answer(request, given, images, reading))

    async def _fetched(self, urls: Sequence[str]) -> list[bytes]:
        try:
            return [await image_at(url, self._fetcher) for url in urls]
        except InvalidRequest as error:
            raise error.named({error.field: "url"}) from None

    async def _answer(
        self, request: Request, given: ImageParameters, images: Sequence[bytes], reading: Reading
    ) -> Response:
        await self._front.check_model(given.model)
        stride = (await self._front.requests.describe()).model.latent_stride
        modality = Modality.IMG2IMG if images else Modality.TEXT2IMG
        # Images come before the text, as the model was made for.
        parts = [*map(image_part, images), text_part(given.prompt)]
        given, options = await reading.settings(given, options_of(given), modality, {**FIELD_NAMES, **_NAMES})
        events = self._front.events(given, modality, parts, options, _NAMES)
        if given.stream:
            name = "image_edit" if images else "image_generation"
            return await event_stream(request, _stream(name, given, events, stride))
        results = await unless_gone(request, outcomes(events, given.count))
        return _file(given, results[0]) if reading.as_file else JSONResponse(_response(given, results, stride))


def _file(given: ImageParameters, result: Outcome) -> Response:
    """The picture itself, as a download."""
    format_ = given.output_format or "png"
    name = f'attachment; filename="image_{result.accepted.seed}.{format_}"'
    return Response(result.picture.data, media_type=f"image/{format_}", headers={"Content-Disposition": name})


def _response(given: ImageParameters, results: list[Outcome], stride: int) -> dict[str, Any]:
    """OpenAI's ImagesResponse. seed, and the text of a picture that was thought about, are of our own."""
    data = []
    for result in results:
        item = {"b64_json": base64_of(result.picture.data), "seed": result.accepted.seed}
        data.append(item | ({"think_text": result.finished.text} if result.finished.text else {}))
    return {
        "created": int(time.time()),
        **_about(given, results[0]),
        **({"quality": given.answered_quality} if given.answered_quality else {}),  # no answer's type has "auto"
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
            described = _event(name, given, result, event, stride)
            if described is not None:
                yield {**described, "index": number} if given.count > 1 else described


def _event(
    name: str, given: ImageParameters, result: Outcome, event: gateway_pb2.GenerateResponse, stride: int
) -> dict[str, Any] | None:
    """An event as a client of the stream gets it; None for one that it does not get."""
    match event.WhichOneof("event"):
        case "preview":
            described = _described(f"{name}.partial_image", given, result, event.preview.picture)
            return {**described, "partial_image_index": event.preview.index}
        case "finished":
            described = _described(f"{name}.completed", given, result, result.picture)
            thought = {"think_text": result.finished.text} if result.finished.text else {}
            return {
                **described,
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


def _described(type_: str, given: ImageParameters, result: Outcome, picture: common_pb2.Picture) -> dict[str, Any]:
    return {
        "type": type_,
        "b64_json": base64_of(picture.data),
        "created_at": int(time.time()),
        **_about(given, result),
        "quality": given.answered_quality or "auto",
    }


def _about(given: ImageParameters, result: Outcome) -> Mapping[str, str]:
    return {"background": "opaque", "output_format": given.output_format or "png", "size": result.size}


def _identified(given: ImageParameters) -> Mapping[str, str]:
    identifier = given.safety_identifier or given.user
    return {"safety_identifier": identifier} if identifier else {}
