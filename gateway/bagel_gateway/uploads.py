"""Calls to the services whose request may be large: let go once it is sent, and large ones sent one at a time.

gRPC keeps the request of a unary call, as a message and in bytes, until its answer ends. As a stream of one message,
which is the same on the wire, it is made when it is sent and forgotten when it has been. It is put together from pieces
here, as protobuf would copy the images three times: into the message, while it is written, and into its bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from grpc import aio

from bagel.v1 import common_pb2

R = TypeVar("R")
Pieces = list[bytes]

LARGE_BYTES = 2**20
_BYTES = 2
"""The wire type of bytes and of messages: a length, then so many bytes."""


class Upload(Generic[R]):
    """A method that takes one message and streams its answers."""

    def __init__(self, channel: aio.Channel, path: str, response: Callable[[bytes], R]) -> None:
        self._call = channel.stream_stream(path, _joined, response)
        self._turn = asyncio.Lock()

    def __call__(
        self, make: Callable[[], Pieces], nbytes: int, *, timeout: float | None, metadata: Sequence[tuple[str, str]]
    ) -> aio.StreamStreamCall[Pieces, R]:
        """Call it with the message that `make` makes, of about so many bytes, when it is its turn."""

        async def once() -> AsyncIterator[Pieces]:
            async with self._turn if nbytes > LARGE_BYTES else nullcontext():
                yield make()

        call: aio.StreamStreamCall[Pieces, R] = self._call(once(), timeout=timeout, metadata=tuple(metadata))
        return call


def with_parts(message: Message, name: str, parts: Iterable[common_pb2.Part]) -> Pieces:
    """The bytes of a message with its parts, which are its field `name`."""
    pieces = [message.SerializeToString()]
    for part in parts:
        pieces += field_of(message, name, _part(part))
    return pieces


def field_of(message: Message, name: str, value: Pieces) -> Pieces:
    """One field of bytes, or of a message, as it is written: its number, its length, its value."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return [_varint(number << 3 | _BYTES) + _varint(sum(map(len, value))), *value]


def bytes_of(parts: Iterable[common_pb2.Part]) -> int:
    """About how many bytes the parts of a prompt take."""
    return sum(part.ByteSize() for part in parts)


def _joined(pieces: Pieces) -> bytes:
    """A message's bytes; the pieces are let go."""
    data = b"".join(pieces)
    pieces.clear()
    return data


def _part(part: common_pb2.Part) -> Pieces:
    """A part's bytes; an image's file is read out of it once."""
    if not part.HasField("image"):
        return [part.SerializeToString()]
    entered: dict[str, Any] = {
        name: getattr(part.image, name) for name in ("for_generation", "for_understanding") if part.image.HasField(name)
    }
    image = common_pb2.ImagePart(**entered)
    return field_of(part, "image", [image.SerializeToString(), *field_of(image, "data", [part.image.data])])


def _varint(value: int) -> bytes:
    """A whole number as protobuf writes it: seven bits a byte, the lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
