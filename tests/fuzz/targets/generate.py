"""`Generate`: a request as a client sends it, up to what the gateway plans with."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO

from PIL import Image

from bagel.errors import InvalidRequest
from bagel.images import image_size
from bagel.request import Modality
from bagel.rpc import convert
from bagel.rpc.errors import Undecodable, decoding
from bagel.v1 import common_pb2, gateway_pb2
from tests.fuzz.target import Target

READ = decoding(gateway_pb2.GenerateRequest.FromString)


def check(data: bytes) -> None:
    message = READ(data)
    if isinstance(message, Undecodable):
        raise InvalidRequest("request", message.why)
    request = message.request
    modality = convert.modality_from_wire(request.modality)
    options = convert.options_from_wire(request)
    convert.output_from_wire(message)
    convert.check_prompt(request.prompt)
    sizes = [image_size(part.image.data) for part in request.prompt if part.HasField("image")]
    assert all(min(size) > 0 for size in sizes)
    # What was understood, said again, is understood as the same.
    again = convert.options_to_wire(modality, request.prompt, options)
    told = common_pb2.Request.FromString(again.SerializeToString())
    assert convert.modality_from_wire(told.modality) is modality
    assert repr(convert.options_from_wire(told)) == repr(options), "a round trip changes the options"


def seeds() -> Iterable[bytes]:
    picture = BytesIO()
    Image.new("RGB", (3, 2)).save(picture, "PNG")
    text = common_pb2.Part(text=common_pb2.TextPart(text="a red cube"))
    image = common_pb2.Part(image=common_pb2.ImagePart(data=picture.getvalue(), for_generation=True))
    many: dict[str, object] = {"seed": 7, "think": True, "max_think_tokens": 9, "stop_token_ids": [1, 2]}
    many |= {"steps": 3, "cfg_text_scale": 4.0, "cfg_interval": (0.4, 1.0), "negative_prompt": "grey", "height": 32}
    for modality, parts in (
        (Modality.TEXT2IMG, [text]),
        (Modality.IMG2IMG, [image, text]),
        (Modality.IMG2TEXT, [image]),
    ):
        request = convert.options_to_wire(modality, parts, many)
        yield gateway_pb2.GenerateRequest(request=request).SerializeToString()


WORDS = (b"\x0a\x00", b"\xf8\x7f\x2a", b"\x89PNG", b"\x00\x00\xc0\x7f", b"\xff" * 9)
TARGET = Target(check, (InvalidRequest,), seeds, words=WORDS)
