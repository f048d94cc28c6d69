"""A gateway's responses as events. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import grpc
from PIL import Image

from bagel.errors import BagelError, InvalidRequest, RemoteError, TransferDamaged
from bagel.events import Accepted, DrawingStarted, PrefillDone, Preview, Result, ServiceEvent, StepDone, TextDelta
from bagel.rpc import convert
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.integrity import Digest, Trailing, parsed
from bagel.v1 import common_pb2, gateway_pb2

GENERATE, DESCRIBE = "/bagel.v1.GatewayService/Generate", "/bagel.v1.GatewayService/DescribeModel"


class ResponseReader:
    """Responses of one request as events. The picture comes in the Result, with the rest of it.

    index: of the request among several; target: the gateway, for messages; sent: the request's bytes.
    """

    def __init__(self, index: int, target: str, sent: bytes = b"", method: str = GENERATE) -> None:
        self._index, self._target, self._digest = index, target, Digest(method, sent)
        self._accepted = gateway_pb2.Accepted()
        self._settings: Mapping[str, Any] = {}
        self._picture = common_pb2.Picture()
        self._finished: gateway_pb2.Finished | None = None

    def read(self, data: bytes) -> ServiceEvent | None:
        """The event of a response; None for the picture, the result, and what a newer gateway may send."""
        self._digest.add(data)
        response = parsed(gateway_pb2.GenerateResponse.FromString, data, self._target)
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted = accepted = response.accepted
                self._settings = convert.options_from_wire(accepted.resolved)
                return Accepted(self._index, accepted.request_id, accepted.seed, accepted.pipeline, self._settings)
            case "prefill":
                return PrefillDone(self._index, response.prefill.tokens)
            case "text":
                return TextDelta(self._index, response.text.text, response.text.think)
            case "drawing":
                return DrawingStarted(self._index, response.drawing.waited_seconds)
            case "step":
                return StepDone(self._index, response.step.step, response.step.steps)
            case "preview":
                preview = response.preview
                return Preview(self._index, preview.index, preview.step, self._preview(preview.picture))
            case "picture":
                self._picture = response.picture
            case "finished":
                self._finished = response.finished
        return None

    def error(self, error: grpc.RpcError) -> BagelError:
        """What the request failed with; an InvalidRequest says which of several requests it is about."""
        try:
            self._digest.check_failed(error, self._target)
        except TransferDamaged as damaged:  # the error is that of another request than the one that was sent
            return damaged
        failure = from_rpc_error(error, self._target)
        if isinstance(failure, InvalidRequest):
            failure.index = self._index
        return failure

    def result(self, trailing: Trailing) -> Result:
        """The Result of a stream that has ended, which nobody sees before it is known to be undamaged.

        trailing: the metadata that the stream ended with. Raises TransferDamaged, or RemoteError if the gateway ended
        the stream without its last event.
        """
        self._digest.check(trailing, self._target)
        if self._finished is None:
            raise RemoteError(f"{self._target} ended the request without its result", "INTERNAL")
        return self._result(self._finished)

    def _preview(self, picture: common_pb2.Picture) -> Image.Image:
        try:
            return _image(picture)
        except (OSError, SyntaxError) as error:  # before the digest that would tell
            raise TransferDamaged(
                f"a preview of {self._target} cannot be read ({error}); send the request again"
            ) from None

    def _result(self, finished: gateway_pb2.Finished) -> Result:
        # All fields, also those that are 0, which ListFields leaves out.
        usage = {field.name: getattr(finished.usage, field.name) for field in common_pb2.Usage.DESCRIPTOR.fields}
        return Result(
            self._index,
            _image(self._picture) if self._picture.data else None,
            finished.text,
            tuple(finished.token_ids),
            self._accepted.seed,
            convert.timings_from_wire(finished.timings),
            usage,
            self._accepted.request_id,
            self._settings,
            convert.timings_from_wire(finished.profile),
            self._picture.data,
        )


def _image(picture: common_pb2.Picture) -> Image.Image:
    image = Image.open(BytesIO(picture.data))
    # Pillow reads a file only when its pixels are asked for: a damaged one fails here, not in the user's code.
    image.load()
    return image
