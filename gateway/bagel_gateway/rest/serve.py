"""From parameters to a request's events: what the endpoints share."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from bagel.errors import InvalidRequest
from bagel.request import Modality
from bagel.rpc import convert
from bagel.telemetry.logs import Log
from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.rest.dialect import OmniReading, Reading
from bagel_gateway.rest.errors import UnknownModel, renamed
from bagel_gateway.rest.parameters import FIELD_NAMES, Parameters, generate_request
from bagel_gateway.serving import Requests

Events = AsyncGenerator[tuple[int, gateway_pb2.GenerateResponse], None]

log = Log("bagel_gateway.rest")


@dataclass
class Outcome:
    """What one result came to so far."""

    accepted: gateway_pb2.Accepted = field(default_factory=gateway_pb2.Accepted)
    picture: common_pb2.Picture = field(default_factory=common_pb2.Picture)
    finished: gateway_pb2.Finished = field(default_factory=gateway_pb2.Finished)

    def take(self, event: gateway_pb2.GenerateResponse) -> None:
        """Remember an event."""
        match event.WhichOneof("event"):
            case "accepted":
                self.accepted = event.accepted
            case "picture":
                self.picture = event.picture
            case "finished":
                self.finished = event.finished

    @property
    def usage(self) -> common_pb2.Usage:
        return self.finished.usage

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of the picture, known from the beginning."""
        image = self.accepted.resolved.image
        return f"{image.width}x{image.height}"


class Front:
    """What endpoints serve requests with.

    names: of the model, its own first; none: what the service calls it. compat: whose clients' requests are taken too.
    """

    def __init__(self, requests: Requests, names: tuple[str, ...], compat: str = "none") -> None:
        self.requests, self._names, self.compat = requests, names, compat

    def reading(self) -> Reading:
        """How the next request is read."""
        return OmniReading(self.requests) if self.compat == "vllm-omni" else Reading()

    @property
    def max_images(self) -> int:
        """Input images of one request."""
        return self.requests.images.max_images

    async def names(self) -> tuple[str, ...]:
        """The names of the model; NoBackend if none is configured and nothing is ready to tell."""
        if self._names:
            return self._names
        name = (await self.requests.describe()).model.name
        # Clients need not know the folders of the machine that serves.
        return (PurePath(name).name if PurePath(name).is_absolute() else name,)

    async def check_model(self, asked: str | None) -> str:
        """The name to answer with; UnknownModel for one that is not served."""
        names = await self.names()
        if asked is not None and asked not in names:
            raise UnknownModel(f"the model {asked!r:.200} is not served here; these are: {', '.join(names)}")
        return asked or names[0]

    async def events(
        self,
        given: Parameters,
        modality: Modality,
        parts: Iterable[common_pb2.Part],
        options: Mapping[str, Any],
        names: Mapping[str, str],
    ) -> Events:
        """What happens, (which of n, event). names: parameters by the fields that errors name."""
        names = {**FIELD_NAMES, **names}
        if given.user or given.safety_identifier:
            log.info("asked", user=given.user, safety_identifier=given.safety_identifier)
        try:
            message = generate_request(given, convert.options_to_wire(modality, parts, options))
            # HTTP knows no deadline; a client that leaves cancels its request.
            async with aclosing(self.requests.serve_many(message, given.count, lambda: None)) as events:
                async for event in events:
                    yield event
        except InvalidRequest as error:
            raise renamed(error, names, given.size) from None


async def outcomes(events: Events, count: int) -> list[Outcome]:
    """All results, at their end."""
    results = [Outcome() for _ in range(count)]
    async with aclosing(events):
        async for number, event in events:
            results[number].take(event)
    return results


def image_tokens(outcome: Outcome, stride: int) -> int:
    """Latent tokens of a picture."""
    return (outcome.picture.width // stride) * (outcome.picture.height // stride)


def text_part(text: str) -> common_pb2.Part:
    """A text of a prompt."""
    try:
        return common_pb2.Part(text=common_pb2.TextPart(text=text))
    except (ValueError, UnicodeEncodeError):
        raise InvalidRequest("prompt", "the prompt is no Unicode text; send UTF-8") from None


def image_part(data: bytes) -> common_pb2.Part:
    """An image of a prompt, as its file."""
    return common_pb2.Part(image=common_pb2.ImagePart(data=data))


def check_images(count: int, field: str, most: int) -> None:
    """Raise InvalidRequest for more images than one request may have."""
    if count > most:
        raise InvalidRequest(field, f"there are {count} images; one request may have {most}")


def base64_of(data: bytes) -> str:
    """As text."""
    return base64.b64encode(data).decode("ascii")
