"""gRPC requests as they come in: bounded in bytes, all of them together, also while they are on their way.

gRPC says neither how large a message will be nor how much of it has come, and once a message is asked for, all of it
comes. So only so many are asked for at once. One that is not there at once counts as the largest that there may be
until it is there; where many are slow, the slowest makes way for the next.
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
"""Messages that may turn out to be small are asked for at once; thousands of small ones come in a second."""
AT_ONCE_S = 0.05
"""For a small one, which has come before it is asked for."""
TURN_S = 5.0
"""To wait until it is asked for."""
PATIENCE_S = 10.0
"""That a slow message has, even if others wait for its room."""


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
        """The one message of a call, in a list to be taken out of; its bytes are held until the end of the block.

        Raises Busy where there is no room for it, RequestTooSlow if it does not come, InvalidRequest if none is sent.
        """
        with self._room.hold() as held:
            async with self._turn(context.peer()):
                # Never cancelled: what is being read ends with its call.
                reading: asyncio.Future[Any] = asyncio.ensure_future(_read(context))
                await asyncio.wait({reading}, timeout=AT_ONCE_S)
                if not reading.done():
                    held.resize(MAX_MESSAGE_BYTES)
                    self._make_way()
            if not reading.done():
                await self._slowly(reading)
            data = reading.result()
            if not isinstance(data, bytes):
                raise InvalidRequest("request", "the call ended before its request had come")
            held.resize(len(data))
            taken = [data]
            del data, reading
            yield taken

    @asynccontextmanager
    async def _turn(self, caller: str) -> AsyncIterator[None]:
        """One message of a connection at a time: a thousand calls of one that sends none must not take every turn."""
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
        """Wait for a message; another one's wait may end for it, and its own for another's."""
        waiting: asyncio.Future[bytes] = asyncio.shield(reading)
        self._slow[waiting] = time.monotonic()
        try:
            await asyncio.wait({waiting}, timeout=self._limit_s)
            if waiting.cancelled():
                raise self._busy()
            if not waiting.done():
                told = f"the request did not come within {self._limit_s:g} s, the limit (--grpc-message-timeout)"
                raise RequestTooSlow(f"{told}; send it faster")
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
    """The message, or EOF, or what the call ended with: nobody may be left to be told."""
    try:
        return await context.read()
    except Exception as error:
        return error
