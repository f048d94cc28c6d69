"""Calls to the services whose request may be large: it is made when it is sent, and large ones go one at a time.

gRPC keeps the request of a unary call, as a message and as bytes, until its answer ends. A stream of one message is the
same on the wire, and gRPC forgets that message once it is sent. Its bytes are put together from pieces here, because
protobuf would copy each image three times: into the message, while it is written, and into its bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc import aio

from bagel.errors import RemoteError
from bagel.prompts import Part, Prompt, TextPart
from bagel.rpc import alive
from bagel.rpc.integrity import Digest, parsed
from bagel.rpc.structure import varint
from bagel.rpc.unread import SLOWEST_BYTES_PER_S
from bagel.v1 import common_pb2
from bagel_gateway.images import file_of

R = TypeVar("R")
Pieces = list[bytes]

LARGE_BYTES = 2**20
_BYTES = 2
"""The wire type of bytes and of messages: a length, then so many bytes."""


class Answers(Generic[R]):
    """The answers of one call as messages. Once all have come, they are what the peer has sent, or TransferDamaged.

    silence_s: how long neither an answer nor a sign of life may come, before RemoteError is raised. It counts from the
    time when the request is made, which has as long as a slow network takes.
    """

    def __init__(self, method: str, read: Callable[[bytes], R], peer: str, silence_s: float) -> None:
        self._method, self._read, self._peer, self._silence_s = method, read, peer, silence_s
        self._limit_s: float | None = None
        self._timer: asyncio.Timeout | None = None
        self.digest = Digest(method)
        """Of what is sent, once it is."""

    def begin(self, call: aio.StreamStreamCall[Pieces, bytes]) -> Self:
        """Take the answers of this call."""
        self._call = call
        return self

    def sent(self, request: Pieces) -> None:
        """The request is made, and goes out."""
        self.digest = Digest(self._method, *request)
        self._limit_s = self._silence_s + sum(map(len, request)) / SLOWEST_BYTES_PER_S
        if self._timer is not None:
            self._timer.reschedule(asyncio.get_running_loop().time() + self._limit_s)

    def cancel(self) -> bool:
        """End the call, which ends the reading."""
        return self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        while (data := await self._next()) == alive.SIGN:
            self.digest.add(data)
        self.digest.add(data)
        return parsed(self._read, data, self._peer)

    async def _next(self) -> bytes:
        """The next message, or sign of life."""
        try:
            async with asyncio.timeout(self._limit_s) as self._timer:
                data = await self._call.read()
        except grpc.RpcError as error:
            # One that is about another request than the one that was sent tells nothing.
            self.digest.check_failed(error, self._peer)
            raise
        except TimeoutError:
            raise RemoteError(
                f"{self._peer} answers, but has not said for {self._silence_s:g} s that it works on this request: what "
                "was sent, or its end, was lost on the way; send it again, and use TLS where this comes again",
                "UNAVAILABLE",
            ) from None
        finally:
            self._timer = None
        self._limit_s = self._silence_s
        if not isinstance(data, bytes):  # grpc.aio.EOF, of a call that has ended well
            self.digest.check(await self._call.trailing_metadata(), self._peer)
            raise StopAsyncIteration
        return data


class Upload(Generic[R]):
    """A method of a peer that takes one message and streams its answers, and signs of life while it has none.

    silence_s: after which a peer that answers nothing at all is given up; a call alone has twice as long.
    """

    def __init__(
        self, channel: aio.Channel, path: str, response: Callable[[bytes], R], peer: str, silence_s: float
    ) -> None:
        self._method, self._call = path, cast(Any, channel.stream_stream(path, _joined, None))
        # Twice, as a service that is silent as a whole is found by its checks, and told as that.
        self._response, self._peer, self._silence_s = response, peer, 2 * silence_s
        self._turn = asyncio.Lock()

    def __call__(
        self, make: Callable[[], Pieces], nbytes: int, *, timeout: float | None, metadata: Sequence[tuple[str, str]]
    ) -> Answers[R]:
        """Call it with the message that `make` makes, of about so many bytes, when it is its turn."""
        answers = Answers(self._method, self._response, self._peer, self._silence_s)

        async def once() -> AsyncIterator[Pieces]:
            # A large message is held whole while it is put together, so only one of them is at a time.
            async with self._turn if nbytes > LARGE_BYTES else nullcontext():
                pieces = make()
                answers.sent(pieces)
                yield pieces

        # A stream of one message, which gRPC forgets once it is sent; it keeps a unary request to the end.
        return answers.begin(self._call(once(), timeout=timeout, metadata=(*metadata, *alive.asking(self._silence_s))))


def with_prompt(message: Message, name: str, prompt: Prompt) -> Pieces:
    """The bytes of a message with a prompt, which is its field `name`."""
    pieces = [message.SerializeToString()]
    for part in prompt:
        pieces += field_of(message, name, _pieces(part))
    return pieces


def field_of(message: Message, name: str, value: Pieces) -> Pieces:
    """One field of bytes, or of a message, as protobuf writes it: its number, its length, its value."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return [varint(number << 3 | _BYTES) + varint(sum(map(len, value))), *value]


def bytes_of(prompt: Prompt) -> int:
    """About how many bytes a prompt takes."""
    return sum(
        len(part.text.encode()) if isinstance(part, TextPart) else file_of(part).message.ByteSize() for part in prompt
    )


def without_data(part: Part) -> common_pb2.Part:
    """A part as a message, without an image's file."""
    if isinstance(part, TextPart):
        return common_pb2.Part(text=common_pb2.TextPart(text=part.text))
    image = common_pb2.ImagePart(for_generation=part.for_generation, for_understanding=part.for_understanding)
    return common_pb2.Part(image=image)


def _pieces(part: Part) -> Pieces:
    """A part's bytes; an image's file is copied out of its message here, once."""
    message = without_data(part)
    if isinstance(part, TextPart):
        return [message.SerializeToString()]
    data = field_of(message.image, "data", [file_of(part).message.data])
    return field_of(message, "image", [message.image.SerializeToString(), *data])


def _joined(pieces: Pieces) -> bytes:
    """A message's bytes; the pieces are let go."""
    data = b"".join(pieces)
    pieces.clear()
    return data
