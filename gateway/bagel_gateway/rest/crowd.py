"""How many requests are worked for at once: one whose body does not come gives way to those that are whole."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel.errors import Busy
from bagel_gateway.rest.refusals import refuse

PROBES = frozenset({"/healthz", "/health", "/readyz", "/metrics"})


class Crowd:
    """ASGI middleware: works for so many requests at once; beyond, it answers probes alone.

    Where there is no place for one more, the one that has waited longest for bytes of its body goes: a few hundred
    connections with half a body each would keep everybody out otherwise.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._now = app, most, 0
        self._awaited: dict[_Upload, None] = {}  # in order of their wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, which has a connection of its own."""
        # Probes take no place, so that a crowded gateway still answers its health checks.
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._now >= self._most and not self._one_gives_way():
            message = f"{self._most} connections have requests under way, the most that are worked for; try again later"
            await refuse(Busy(message), scope, receive, send, linger=False)
            return
        self._now += 1
        upload = _Upload(receive, self._awaited)
        try:
            await self._app(scope, upload.receive, send)
        finally:
            # A request that gave way was subtracted when it did.
            self._now -= not upload.gave_way

    def _one_gives_way(self) -> bool:
        """End the one that has waited longest for its body; False if none waits."""
        if not self._awaited:
            return False
        next(iter(self._awaited)).give_way()
        self._now -= 1  # from now on, whenever its client has the answer
        return True


class _Upload:
    """One request's body on its way in. awaited: those that wait for bytes, where it puts itself."""

    def __init__(self, receive: Receive, awaited: dict[_Upload, None]) -> None:
        self._receive, self._awaited = receive, awaited
        self._timer = asyncio.timeout(None)
        self._complete = self.gave_way = False

    async def receive(self) -> Message:
        """The next message; Busy if the place was needed before the body was complete."""
        if self._complete:
            return await self._receive()
        message: Message = {}
        try:
            if not self.gave_way:
                message = await self._await_bytes()
        except TimeoutError:
            assert self.gave_way
        if self.gave_way:
            raise Busy("the body had not come when the place of its request was needed for another; send it again")
        self._complete = not message.get("more_body", False)
        return message

    def give_way(self) -> None:
        """End the wait for bytes, and with it the request."""
        self.gave_way = True
        del self._awaited[self]
        self._timer.reschedule(asyncio.get_running_loop().time())

    async def _await_bytes(self) -> Message:
        async with asyncio.timeout(None) as self._timer:
            self._awaited[self] = None
            try:
                return await self._receive()
            finally:
                # `give_way` may have taken it out already.
                self._awaited.pop(self, None)
