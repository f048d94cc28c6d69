"""Requests as a client sends them: a user's arguments as a message. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from bagel.effect import UNHEARD
from bagel.errors import Busy, InvalidImage, InvalidRequest
from bagel.events import ServiceEvent
from bagel.images import StrPath, to_rgb
from bagel.images.output import OutputFormat
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality
from bagel.rpc import convert
from bagel.rpc.deadlines import deadline_of
from bagel.telemetry.logs import REQUEST_ID, new_request_id
from bagel.telemetry.tracing import trace_metadata
from bagel.v1 import common_pb2, gateway_pb2

ImageInput = StrPath | bytes | Image.Image
PromptPart = str | TextPart | ImagePart | common_pb2.Part
PromptInput = str | Sequence[PromptPart]
OnServiceEvent = Callable[[ServiceEvent], None]
MANY = 64
"""Requests of generate_many that are under way at once; the gateway's own default limit."""
_READ_IMAGE = "give a path, the bytes of an image file or a PIL image"


@dataclass(frozen=True)
class Call:
    """One request as it goes out. timeout: seconds that are left; deadline: of time.monotonic."""

    message: gateway_pb2.GenerateRequest
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    deadline: float | None = None
    index: int = 0

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def again(self, refused: Busy) -> Call:
        """The call to make once more; Busy if its time is over."""
        if self.left_s == 0:
            raise refused
        return replace(self, timeout=self.left_s)

    def check_only(self) -> Call:
        """The call that asks whether this one can be served."""
        message = gateway_pb2.GenerateRequest()
        # A copy, since the call itself is still to be made.
        message.CopyFrom(self.message)
        message.check_only = True
        return replace(self, message=message)


def make_call(
    prompt: PromptInput,
    *,
    modality: str = Modality.TEXT2IMG,
    image: ImageInput | None = None,
    timeout: float | None = None,
    request_id: str | None = None,
    output_format: str = "PNG",
    output_compression: int | None = None,
    partial_images: int = 0,
    **options: Any,
) -> Call:
    """A call of the arguments of `generate`. Raises InvalidRequest for what no message can say; the gateway checks the
    rest.
    """
    if modality not in list(Modality):
        raise InvalidRequest("modality", f"modality is {modality!r}; it must be one of {', '.join(Modality)}")
    output = OutputFormat(output_format, output_compression, partial_images)
    request = convert.options_to_wire(Modality(modality), _parts(prompt, image), options)
    message = gateway_pb2.GenerateRequest(request=request)
    convert.output_to_wire(output, message)
    seconds = deadline_of(timeout)
    # The time counts from here, so that waiting for a turn is part of the timeout.
    deadline = None if seconds is None else time.monotonic() + seconds
    return Call(message, seconds, ((REQUEST_ID, request_id or new_request_id()), *trace_metadata()), deadline)


def listed(
    requests: Iterable[Mapping[str, Any] | str], on_event: OnServiceEvent | None
) -> list[Mapping[str, Any] | str]:
    """The requests; InvalidRequest for what is no list of them, or a setting that only adds events without on_event."""
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise InvalidRequest("requests", f"requests is {requests!r:.80}; give a list, like ['a cat', 'a dog']")
    requests = list(requests)
    for request in requests:
        if isinstance(request, Mapping):
            refuse_unheard(request, on_event)
    return requests


def call_of(arguments: Mapping[str, Any] | str, index: int) -> Call:
    """A call from the arguments of `generate`, or from a prompt."""
    if not isinstance(arguments, Mapping | str):
        raise InvalidRequest(
            "requests", f"a request is {arguments!r:.80}; give a prompt or the arguments of generate, by their names"
        )
    given = {"prompt": arguments} if isinstance(arguments, str) else arguments
    if "prompt" not in given:
        raise InvalidRequest("prompt", "a request has no prompt; give each one, like {'prompt': 'a large red circle'}")
    return replace(make_call(**given), index=index)


def check_at_once(at_once: object) -> None:
    """Refuse what is no number of requests; a semaphore of none would be waited for without end."""
    # True and False are whole numbers for Python.
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise InvalidRequest("at_once", f"at_once is {at_once!r:.80}; it must be a whole number at least 1")


def refuse_unheard(settings: Mapping[str, Any], on_event: OnServiceEvent | None) -> None:
    """Raise InvalidRequest for settings that only add events, where on_event is None."""
    if on_event is None:
        UNHEARD.refuse(settings)


def _parts(prompt: PromptInput, image: ImageInput | None) -> list[common_pb2.Part]:
    """The prompt's parts, an image given beside it first."""
    before = [] if image is None else [common_pb2.Part(image=common_pb2.ImagePart(data=_image_bytes(image)))]
    if isinstance(prompt, str):
        return [*before, _part(prompt)]
    # Both can be iterated over, and would become parts by their bytes or keys.
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequest(
            "prompt", f"prompt is {prompt!r:.80}; it must be a text, or a list of texts, TextPart and ImagePart"
        )
    return [*before, *map(_part, prompt)]


def _part(part: object) -> common_pb2.Part:
    if isinstance(part, common_pb2.Part):
        return part
    if isinstance(part, str):
        part = TextPart(part)
    if isinstance(part, TextPart | ImagePart):
        return convert.part_to_wire(part)
    raise InvalidRequest("prompt", f"a part of the prompt is {part!r:.80}; it must be a text, a TextPart or ImagePart")


def _image_bytes(image: ImageInput) -> bytes:
    """An image's file; a PIL image becomes a PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return OutputFormat().encode(to_rgb(image))
    try:
        return Path(image).read_bytes()
    except TypeError:
        raise InvalidImage("image", f"image is {image!r:.80}; {_READ_IMAGE}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidImage("image", f"the image {str(image)!r} cannot be read: {reason}; {_READ_IMAGE}") from None
