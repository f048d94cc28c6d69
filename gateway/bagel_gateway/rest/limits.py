"""Bodies are bounded while they are read: each by itself, all of them together, and in time."""

from __future__ import annotations

import asyncio
import math
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel.deployment.http_front import HttpFront
from bagel_gateway.rest.errors import BodyTooLarge, BodyTooSlow
from bagel_gateway.room import Held, Room

TEXT_PATHS = frozenset({"/v1/images/generations"})
"""Routes whose bodies have no image."""
_DIGITS = 18
"""Most digits of a number of bytes: one with more is larger than any body that is read."""


class LimitBodies:
    """ASGI middleware: reading a body raises BodyTooLarge, BodyTooSlow or Busy where it goes over a limit."""

    def __init__(self, app: ASGIApp, guards: HttpFront, room: Room) -> None:
        self._app, self.guards, self._room = app, guards, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self.guards.max_body_bytes
        if scope["path"] in TEXT_PATHS:
            most = min(most, self.guards.max_text_body_bytes)
        with self._room.hold() as held:
            body = _Body(self.guards, held, most, receive, send, dict(scope["headers"]))
            await self._app(scope, body.receive, body.send)


class _Body:
    """One request's body on its way in. held: its bytes, as long as the request is served."""

    def __init__(
        self, guards: HttpFront, held: Held, most: int, receive: Receive, send: Send, headers: dict[bytes, bytes]
    ) -> None:
        self._guards, self._held, self._most, self._receive, self._send = guards, held, most, receive, send
        self._announced = _announced(headers)
        self._complete = self._announced == 0
        self._waited_s, self._came = 0.0, 0

    async def receive(self) -> Message:
        """The next message; once the body is complete it waits for the end of the connection."""
        if self._complete:
            return await self._receive()
        if self._announced is not None and self._announced > self._most:
            # Refused by what it announces, before any of it is read.
            self._raise_too_large()
        message = await self._in_pace()
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            if self._held.nbytes + more > self._most:
                self._raise_too_large()
            # Counted before the application gets it, and keeps it.
            self._held.resize(self._held.nbytes + more)
            self._came += more
            self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on what is answered; before the body was read, the connection ends with the answer."""
        if message["type"] == "http.response.start" and not self._complete:
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await self._send(message)

    async def _in_pace(self) -> Message:
        """The next message. Each body_timeout_s of waiting must have brought its bytes: no credit is saved up, so
        a client that sent much at first may not go on with a byte now and then.
        """
        guards = self._guards
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(guards.body_timeout_s - self._waited_s):
                    message = await self._receive()
            except TimeoutError:
                if self._came < guards.min_body_rate * guards.body_timeout_s:
                    raise BodyTooSlow(
                        "body",
                        f"{self._came} bytes of the request's body came in {guards.body_timeout_s:g} s; send at least "
                        f"{guards.min_body_rate} a second",
                    ) from None
                self._waited_s, self._came = 0.0, 0
            else:
                self._waited_s += time.monotonic() - began
                return message

    def _raise_too_large(self) -> None:
        said = f"{self._announced:.0f} bytes" if self._announced and self._announced < math.inf else "more"
        raise BodyTooLarge("body", f"the request's body has {said}; {self._most} bytes are the most that is read here")


def _announced(headers: dict[bytes, bytes]) -> float | None:
    """Bytes that a request says will come: 0 if it has no body, None if it does not say how many.

    What is no plain number says nothing, and so does a length beside a transfer coding; what is longer than a number of
    bytes can be is infinite.
    """
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        return None
    if length is None:
        return 0
    if not length.isdigit():  # of bytes: ASCII alone
        return None
    digits = length.lstrip(b"0") or b"0"
    return int(digits) if len(digits) <= _DIGITS else math.inf
