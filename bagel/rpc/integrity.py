"""Whether both ends of a call have the same bytes of it: a digest of its messages, which comes with its end.

TCP's checksum is 16 bits wide, and a proxy or a network card may damage what passes behind it. HTTP/2 would not notice
a changed seed, or an answer that is given to another call of its connection. So a service sends a digest of the method,
of the request as it came and of all answers in their order. Whoever called compares it with what it sent and received.
Pages of K/V have checksums of their own, and with TLS nothing can be changed. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from bagel.errors import TransferDamaged

WIRE_VERSION = 3
"""What peers say of themselves in `Describe`. It changes with whatever a peer of the version before would drop or read
otherwise, so that a result would change. Version 1 did not say, and sent no digests; those of 2 were BLAKE2b's."""
KEY = "bagel-digest-bin"
"""The trailing metadata that has the digest."""
_BYTES = 16

R = TypeVar("R")
Trailing = Iterable[tuple[str, str | bytes]] | None


class Digest:
    """Of one call: of its method's name, of the request and of each answer; of each its length, then its bytes."""

    def __init__(self, method: str, *request: bytes) -> None:
        """method: its full name, /SERVICE/METHOD: HTTP/2 packs headers by those of calls before, so that a frame that
        is lost may turn it into another's. request: the first message, in pieces."""
        # With the version, so that what a peer of another one says is not taken for right.
        # SHA-256, as processors have instructions for it: half the time of BLAKE2b.
        self._hash = sha256(f"bagel wire {WIRE_VERSION}".encode())
        self._add((method.encode(),))
        self._add(request)

    def add(self, message: bytes) -> None:
        """Take one more message in."""
        self._add((message,))

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What a service sends at the end of the call."""
        return ((KEY, self._digest()),)

    def check(self, trailing: Trailing, peer: str) -> None:
        """Raise TransferDamaged unless a call ended with this digest."""
        self._compare(_told(trailing), peer)

    def check_failed(self, error: grpc.RpcError, peer: str) -> None:
        """Raise TransferDamaged if a call ended with an error that is about another request than the one that was sent.

        An error of gRPC or of a proxy has no digest. What is wrong with a request only our services say, with theirs.
        """
        told = _told(trailing_of(error))
        if told is not None or error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            self._compare(told, peer)

    def _compare(self, told: str | bytes | None, peer: str) -> None:
        if told is None:
            raise TransferDamaged(
                f"{peer} did not say what it received and sent: it is of an older release, or what it said was damaged "
                "on its way; send the request again, or run the same release on both sides"
            )
        if told != self._digest():
            raise TransferDamaged(
                f"what {peer} received and sent is not what was sent and received here: it was damaged on its way; "
                "send the request again, and use TLS where this comes again"
            )

    def _digest(self) -> bytes:
        return self._hash.digest()[:_BYTES]

    def _add(self, pieces: Iterable[bytes]) -> None:
        pieces = tuple(pieces)
        self._hash.update(sum(map(len, pieces)).to_bytes(8, "little"))
        for piece in pieces:
            self._hash.update(piece)


CURRENT: ContextVar[Digest | None] = ContextVar("digest", default=None)
"""The digest of the call that is being served, for the error that it may end with."""


@dataclass(frozen=True)
class Received:
    """A request as it came: its message, and the digest of its bytes, which the answers go into."""

    message: Any
    digest: Digest


def receiving(read: Callable[[bytes], Any], method: str) -> Callable[[bytes], Received]:
    """A request's deserializer that keeps the digest of what came."""
    return lambda data: Received(read(data), Digest(method, data))


def trailing_of(error: grpc.RpcError) -> Trailing:
    """The metadata that came with a call's error, if it is one that tells."""
    trailing: Any = getattr(error, "trailing_metadata", None)
    return trailing() if trailing is not None else None


def _told(trailing: Trailing) -> str | bytes | None:
    """The digest that a call ended with, if there is one."""
    return next((value for key, value in trailing or () if key == KEY), None)


def parsed(read: Callable[[bytes], R], data: bytes, peer: str) -> R:
    """An answer as a message; TransferDamaged if it is none."""
    try:
        return read(data)
    except DecodeError as error:
        raise TransferDamaged(f"an answer of {peer} cannot be read ({error}); send the request again") from None


async def checked_unary(
    channel: aio.Channel, path: str, request: Any, read: Callable[[bytes], R], *, peer: str, timeout: float
) -> R:
    """The answer of a call with one message each way. Raises grpc.RpcError as the call does, or TransferDamaged."""
    sent = request.SerializeToString()
    method: Any = channel.unary_unary(path, request_serializer=None, response_deserializer=None)
    call = method(sent, timeout=timeout)
    digest = Digest(path, sent)
    try:
        data = await call
    except grpc.RpcError as error:
        digest.check_failed(error, peer)
        raise
    digest.add(data)
    digest.check(await call.trailing_metadata(), peer)
    return parsed(read, data, peer)
