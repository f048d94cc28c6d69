"""Responses on their way out over gRPC: a client that does not read them keeps nothing for long. No torch here."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any
from urllib.parse import unquote

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from bagel.errors import NotRead
from bagel.rpc import alive
from bagel.rpc.integrity import CURRENT, Digest, Received
from bagel.rpc.unread import Unread, Waiting
from bagel.telemetry.logs import Log

Context = ServicerContext[Any, Any]
Streaming = Callable[[Any, Context], AsyncGenerator[Any, None]]
OPEN_FILES = "/dev/fd"

log = Log("bagel.writing")


def writing(
    method: Streaming, unread: Unread, serialize: Callable[[Any], bytes] | None
) -> Callable[[Received, Context], Awaitable[None]]:
    """A servicer's streaming method as a coroutine that writes its responses, each in time, then their digest.

    serialize: None for a method whose responses are bytes with checksums of their own, and need no digest.

    NotRead is raised in the method when a response is not taken in time, which ends its work. What gRPC holds of such a
    call stays until its client reads on or leaves; where that is too much, the connection is broken.

    A caller that asks for signs of life gets them between the responses.
    """

    async def write(received: Received, context: Context) -> None:
        request, digest = received.message, received.digest
        CURRENT.set(digest)

        def break_off(why: str) -> None:
            found = break_connection(context.peer())
            log.warning("a connection is broken whose client does not read", peer=context.peer(), found=found, why=why)

        out = _Out(context, None if serialize is None else digest)
        every_s = None if serialize is None else alive.asked_s(context.invocation_metadata())
        with unread.waiting(break_off) as waiting:
            async with alive.signs(every_s, out.sign), aclosing(method(request, context)) as responses:
                async for response in responses:
                    data = response if serialize is None else serialize(response)
                    if not await _taken(data, out, unread, waiting):
                        waiting.add(_size(request))  # gRPC keeps it as long as the call
                        CURRENT.set(None)  # nobody knows whether the last response has come
                        await responses.athrow(_not_read(context, unread, waiting))
                with suppress(TimeoutError):  # of a client that reads nothing, not even the end
                    async with asyncio.timeout(unread.reader_timeout_s):
                        await out.close()
            if serialize is not None:
                context.set_trailing_metadata(digest.metadata)

    return write


class _Out:
    """The one way out of a call: a message at a time, each into the digest in its turn."""

    def __init__(self, context: Context, digest: Digest | None) -> None:
        self._context, self._digest, self._turn = context, digest, asyncio.Lock()

    async def write(self, data: bytes) -> None:
        async with self._turn:
            if self._digest is not None:
                self._digest.add(data)
            await self._context.write(data)

    async def sign(self) -> None:
        """A sign of life, unless a response is on its way."""
        if not self._turn.locked():
            await self.write(alive.SIGN)

    async def close(self) -> None:
        """Write nothing any more. A sign that is on its way goes first, as the digest has it already."""
        await self._turn.acquire()


async def _taken(response: bytes, out: _Out, unread: Unread, waiting: Waiting) -> bool:
    """Whether the client has made room for a response in time."""
    nbytes = _size(response)
    waiting.add(nbytes)
    try:
        async with asyncio.timeout(unread.time_for(nbytes)):
            await out.write(response)
    except TimeoutError:
        return False
    waiting.take(nbytes)
    return True


def _size(message: Any) -> int:
    """The bytes of a message, whether protobuf or raw; 0 for anything else."""
    if isinstance(message, bytes):
        return len(message)
    return message.ByteSize() if isinstance(message, Message) else 0


def _not_read(context: Context, unread: Unread, waiting: Waiting) -> NotRead:
    seconds = unread.reader_timeout_s
    log.warning(
        "a call ends whose answer is not read", peer=context.peer(), bytes=waiting.nbytes, reader_timeout=seconds
    )
    return NotRead(
        f"nothing of the answer was read for {seconds:g} s, the service's reader_timeout; its call has ended"
    )


def break_connection(peer: str) -> bool:
    """Break this process's TCP connection to a peer as gRPC names it, like ipv4:10.0.0.5:40000; whether there was one.

    grpc.aio has no way to end a call whose client takes nothing: its status would wait behind what is not taken.
    """
    kind, _, address = peer.partition(":")
    host, _, port = unquote(address).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return False
    wanted, found = (host.strip("[]"), int(port)), False
    for name in os.listdir(OPEN_FILES):
        with suppress(OSError):  # closed meanwhile, or no connection
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                # A duplicate, since closing this object would close gRPC's own descriptor.
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    # Sockets of other kinds have other addresses: an event loop's own pair has an empty text.
                    at = connection.getpeername() if connection.family in (socket.AF_INET, socket.AF_INET6) else None
                    if at is not None and (at[0].removeprefix("::ffff:"), at[1]) == wanted:
                        connection.shutdown(socket.SHUT_RDWR)
                        found = True
    return found
