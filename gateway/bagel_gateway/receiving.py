"""gRPC requests as they come in: bounded in bytes, all of them together, also while they are on their way.

gRPC reports neither the size of a message nor how much of it has arrived, and once asked for a message it takes in all
of it. So the gateway asks for few messages at once. One that does not arrive at once counts as one of the largest size
until it is complete; if too many are slow, the slowest makes way for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from weakref import WeakValueDictionary

from grpc import aio

from bagel.errors import Busy, InvalidRequest, RequestTooSlow
from bagel.rpc.limits import MAX_MESSAGE_BYTES
from bagel_gateway.room import Room

AT_ONCE = 2
"""Messages asked for at once. Most are small, and thousands of small ones arrive in a second."""
AT_ONCE_S = 0.05
"""How long a message may take to count as small; a small one has usually arrived before it is asked for."""
TURN_S = 5.0
"""Longest wait for a message's turn to be asked for."""
PATIENCE_S = 10.0
"""How long a slow message keeps its room even if others wait for it."""


class Receiving:
    """Receives messages into a room, of which slow ones take at most three quarters. limit_s: for one message."""

    def __init__(self, room: Room, limit_s: float) -> None:
        self._room, self._limit_s = room, limit_s
        self._most = max(1, room.nbytes * 3 // 4 // MAX_MESSAGE_BYTES)
        self._slow: dict[asyncio.Future[bytes], float] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._callers: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def message(self, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[list[bytes]]:
        """The one message of a call, in a list that the caller empties; its bytes count until the end of the block.

        Raises Busy if there is no room for it, RequestTooSlow if it does not arrive in time, InvalidRequest if none is
        sent.
        """
        with self._room.hold() as held:
            async with self._turn(context.peer()):
                # It is never cancelled: a read ends with its call.
                reading: asyncio.Future[Any] = asyncio.ensure_future(_read(context))
                await asyncio.wait({reading}, timeout=AT_ONCE_S)
                if not reading.done():
                    # gRPC does not say how large it is, so the largest size counts until it is complete.
                    held.resize(MAX_MESSAGE_BYTES)
                    self._make_way()
            if not reading.done():
                await self._slowly(reading)
            data = reading.result()
            if not isinstance(data, bytes):
                raise InvalidRequest("request", "the call ended before its request had come")
            held.resize(len(data))
            taken = [data]
            # The list then has the only reference, and emptying it frees the bytes.
            del data, reading
            yield taken

    @asynccontextmanager
    async def _turn(self, caller: str) -> AsyncIterator[None]:
        """Wait for a turn. A connection has one at a time, so that its idle calls cannot take all turns."""
        # The table is weak: a lock lives only while a call of its connection uses it.
        mine = self._callers.setdefault(caller, asyncio.Lock())
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(TURN_S):
                    await held.enter_async_context(mine)
                    await held.enter_async_context(self._turns)
            except TimeoutError:
                raise Busy("the gateway receives more requests than it can take in; try again later") from None
            yield

    async def _slowly(self, reading: asyncio.Future[bytes]) -> None:
        """Wait for a slow message. Another message may push it out, and it may push out another (`_make_way`)."""
        # Only this wait can be cancelled; the read itself ends with its call.
        waiting: asyncio.Future[bytes] = asyncio.shield(reading)
        self._slow[waiting] = time.monotonic()
        try:
            await asyncio.wait({waiting}, timeout=self._limit_s)
            if waiting.cancelled():
                raise self._busy()
            if not waiting.done():
                problem = f"the request did not come within {self._limit_s:g} s, the limit (--grpc-message-timeout)"
                raise RequestTooSlow(f"{problem}; send it faster")
        finally:
            self._slow.pop(waiting, None)

    def _make_way(self) -> None:
        if len(self._slow) < self._most:
            return
        waiting, since = min(self._slow.items(), key=lambda item: item[1])
        if time.monotonic() - since < PATIENCE_S:
            raise self._busy()
        self._slow.pop(waiting)
        waiting.cancel()

    def _busy(self) -> Busy:
        return Busy(
            f"the gateway receives {self._most} large messages at once, as many as it has memory for; try again later, "
            "or raise --max-bytes-in-flight"
        )


async def _read(context: aio.ServicerContext[Any, Any]) -> Any:
    """The message, EOF, or the error that the call ended with: returned, as no one may be left to catch it."""
    try:
        return await context.read()
    except Exception as error:
        return error
