"""Bodies are bounded while they are read: each by itself, all of them together, and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel.errors import Busy, InvalidRequest
from bagel_gateway.rest.errors import BodyTooLarge

AT_ONCE = 8
"""Largest bodies that may be held at once."""
SILENCE_S = 30.0
"""Between two pieces of a body."""


class LimitBodies:
    """ASGI middleware: reading a body raises BodyTooLarge, Busy or InvalidRequest where it goes over a limit."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max, self._room = app, max_bytes, AT_ONCE * max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self, receive, _announced(scope["headers"]))
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._room += body.held

    def take(self, held: int, more: int) -> None:
        """Make room for more bytes of a body that has `held`."""
        if held + more > self._max:
            raise BodyTooLarge("body", f"the request's body is larger than {self._max} bytes, the most that is read")
        if more > self._room:
            raise Busy("the gateway holds as many request bodies as it has memory for; try again later")
        self._room -= more


class _Body:
    """One request's body on its way in."""

    def __init__(self, limits: LimitBodies, receive: Receive, announced: int) -> None:
        self._limits, self._receive, self._announced = limits, receive, announced
        self.held, self._complete = 0, False

    async def receive(self) -> Message:
        """The next message; once the body is complete it waits for the end of the connection."""
        if self._complete:
            return await self._receive()
        if self._announced > self._limits._max:
            self._limits.take(0, self._announced)
        try:
            async with asyncio.timeout(SILENCE_S):
                message = await self._receive()
        except TimeoutError:
            raise InvalidRequest("body", f"no more of the request's body came for {SILENCE_S:g} s") from None
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            self._limits.take(self.held, more)
            self.held += more
            self._complete = not message.get("more_body", False)
        return message


def _announced(headers: Iterable[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
