"""Bodies are bounded while they are read: each by itself, all of them together, and in time."""

from __future__ import annotations

import asyncio

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
        self._app, self.max_bytes, self._room = app, max_bytes, AT_ONCE * max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self, receive, send, dict(scope["headers"]))
        try:
            await self._app(scope, body.receive, body.send)
        finally:
            self._room += body.held

    def take(self, held: int, more: int) -> None:
        """Make room for more bytes of a body that has `held`."""
        if held + more > self.max_bytes:
            raise BodyTooLarge(
                "body", f"the request's body is larger than {self.max_bytes} bytes, the most that is read"
            )
        if more > self._room:
            raise Busy("the gateway holds as many request bodies as it has memory for; try again later")
        self._room -= more


class _Body:
    """One request's body on its way in. held: bytes that count against the limits."""

    def __init__(self, limits: LimitBodies, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        self._limits, self._receive, self._send = limits, receive, send
        length = headers.get(b"content-length", b"0")
        self._announced = int(length) if length.isdigit() and len(length) < 20 else 0
        self._complete = not self._announced and b"transfer-encoding" not in headers
        self.held = 0

    async def receive(self) -> Message:
        """The next message; once the body is complete it waits for the end of the connection."""
        if self._complete:
            return await self._receive()
        if self._announced > self._limits.max_bytes:
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

    async def send(self, message: Message) -> None:
        """Pass on what is answered; before the body was read, the connection ends with the answer."""
        if message["type"] == "http.response.start" and not self._complete:
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await self._send(message)
