"""/v1/chat/completions: text and images in, a text or a picture out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bagel.errors import InvalidRequest, together
from bagel.request import Modality
from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.rest.answers import Payload, event_stream, unless_gone
from bagel_gateway.rest.bodies import Bodies
from bagel_gateway.rest.dialect import Reading
from bagel_gateway.rest.fetch import Fetcher
from bagel_gateway.rest.images import usage as picture_usage
from bagel_gateway.rest.messages import parts_of, problems_of
from bagel_gateway.rest.parameters import FIELD_NAMES, REFUSED_CHAT, ChatParameters, options_of, read
from bagel_gateway.rest.serve import Events, Front, Outcome, base64_of, outcomes
from bagel_gateway.rest.stops import Stop, stopped

DONE = "[DONE]"
_NAMES = {"prompt": "messages", "image": "messages", "modality": "modalities"}


class Chat:
    """The endpoint."""

    def __init__(self, front: Front, bodies: Bodies, fetcher: Fetcher) -> None:
        self._front, self._bodies, self._fetcher = front, bodies, fetcher

    async def complete(self, request: Request) -> Response:
        """Answer, or draw; roles are not rendered, each text and image becomes a segment, images of a message first."""
        reading = self._front.reading()
        body = reading.body(await self._bodies.read_json(request))
        try:
            given = read(ChatParameters, REFUSED_CHAT, body, typed=True)
        except InvalidRequest as error:
            # The messages' problems are listed too, so that a client can mend all at once.
            raise together([error, *problems_of(body.get("messages"))]) from None
        if given.stream_options is not None and not given.stream:
            raise InvalidRequest("stream_options", "stream_options is for a stream; send stream: true")
        model = await self._front.check_model(given.model)
        return reading.noted(await self._answer(request, given, model, reading))

    async def _answer(self, request: Request, given: ChatParameters, model: str, reading: Reading) -> Response:
        found = parts_of(given.messages, self._fetcher, self._front.max_images, interleave=bool(given.interleave))
        parts = await unless_gone(request, found)
        given.messages.clear()  # they hold the images once more, as text
        images = sum(part.HasField("image") for part in parts)
        modality, names = _modality(given, images), _names(given)
        given, options = await reading.settings(given, options_of(given), modality, {**FIELD_NAMES, **names})
        # Only the tokens of pictures are counted by the stride.
        reply = _Reply(given, model, await self._stride() if given.makes_image else 1)
        events = self._front.events(given, modality, parts, options, names)
        if given.stop:
            events = stopped(events, reply.stops)
        if given.stream:
            return await event_stream(request, reading.chunks(reply.stream(events), draws=given.makes_image))
        whole = reply.whole(await unless_gone(request, outcomes(events, given.count)))
        return JSONResponse(reading.completion(whole))

    async def _stride(self) -> int:
        return (await self._front.requests.describe()).model.latent_stride


class _Reply:
    """Events as chat completions."""

    def __init__(self, given: ChatParameters, model: str, stride: int) -> None:
        self._given, self._stride = given, stride
        self.stops = [Stop(given.stop or ()) for _ in range(given.count)]
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, results: list[Outcome]) -> dict[str, Any]:
        """A chat.completion."""
        choices = [
            {
                "index": number,
                "message": self._message(result),
                "logprobs": None,
                "finish_reason": self._reason(number, result),
            }
            for number, result in enumerate(results)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(results)}

    async def stream(self, events: Events) -> AsyncGenerator[Payload, None]:
        """chat.completion.chunk objects, then [DONE]."""
        results = [Outcome() for _ in range(self._given.count)]
        begun: set[int] = set()
        async with aclosing(events):
            async for number, event in events:
                results[number].take(event)
                delta = self._delta(event)
                if delta is None and event.WhichOneof("event") != "finished":
                    continue
                if number not in begun:
                    begun.add(number)
                    # OpenAI's streams name the role in a choice's first chunk.
                    yield self._chunk(number, {"role": "assistant", "content": ""})
                if delta is not None:
                    yield self._chunk(number, delta)
                else:
                    yield self._chunk(number, {}, self._reason(number, results[number]))
        if self._given.stream_options is not None and self._given.stream_options.include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(results)}
        yield DONE

    def _chunk(self, number: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _message(self, result: Outcome) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.finished.text, "refusal": None}
        if self._given.makes_image:
            message["content"] = result.finished.text or None
            message["images"] = [self._image(result.picture)]
        return message

    def _delta(self, event: gateway_pb2.GenerateResponse) -> dict[str, Any] | None:
        match event.WhichOneof("event"):
            case "text":
                return {"content": event.text.text}
            case "preview":
                return {"partial_images": [self._image(event.preview.picture, event.preview.index)]}
            case "picture":
                return {"images": [self._image(event.picture)]}
        return None

    def _image(self, picture: common_pb2.Picture, index: int = 0) -> dict[str, Any]:
        url = f"data:image/{self._given.output_format or 'png'};base64,{base64_of(picture.data)}"
        return {"type": "image_url", "index": index, "image_url": {"url": url}}

    def _reason(self, number: int, result: Outcome) -> str:
        limit = result.accepted.resolved.text.max_tokens
        cut = not self.stops[number].stopped and 0 < limit <= result.usage.completion_tokens
        return "length" if cut else "stop"

    def _usage(self, results: Sequence[Outcome]) -> dict[str, Any]:
        """True token counts: the prompt once, as it is read once."""
        if self._given.makes_image:
            counted = picture_usage(results, self._stride)
            prompt, completion = counted["input_tokens"], counted["output_tokens"]
        else:
            prompt = results[0].usage.prompt_tokens + results[0].usage.image_tokens
            completion = sum(result.usage.completion_tokens for result in results)
        cached = min(prompt, results[0].usage.reused_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0 if self._given.makes_image else cached},
        }


def _modality(given: ChatParameters, images: int) -> Modality:
    if given.makes_image:
        return Modality.IMG2IMG if images else Modality.TEXT2IMG
    return Modality.IMG2TEXT if images else Modality.TEXT2TEXT


def _names(given: ChatParameters) -> Mapping[str, str]:
    """Parameters by the fields that errors name: as this client called them."""
    names = dict(_NAMES)
    if given.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    elif given.makes_image and given.max_tokens is None:
        # The only text of a picture is its think text.
        names["max_tokens"] = "max_think_tokens"
    if given.temperature is not None:
        names["temperature"] = "temperature"
    return names
