"""Answers go out in pieces, each in time: a client that does not read its answer loses its connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from bagel.rpc.unread import Unread, Waiting
from bagel.telemetry.logs import Log

PIECE = 16 * 1024
UNSENT_BYTES = 2 * PIECE
"""Bytes that the kernel takes ahead of what it has sent: with megabytes of them, two pieces would be minutes apart."""
ABORT = "bagel.abort"
"""The key, in the state of a request, of what ends its connection without waiting for its client."""

log = Log("bagel_gateway.rest")


def send_little_ahead(listening: socket.socket) -> None:
    """Let the connections of a listening socket take few bytes that they cannot send yet."""
    if option := getattr(socket, "TCP_NOTSENT_LOWAT", None):  # Linux and macOS have it
        listening.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)


class Abortable(H11Protocol):
    """uvicorn's connection, which requests can end at once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Tell the connection's requests how, and have them wait until what they sent has gone to the kernel."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # of none, TLS would wait for ever
        # A copy, since uvicorn gives all its connections the same state.
        self.app_state = {**self.app_state, ABORT: transport.abort}


class InPieces:
    """ASGI middleware, the outermost: a client has `unread.reader_timeout_s` for each piece of what it is sent."""

    def __init__(self, app: ASGIApp, unread: Unread) -> None:
        self._app, self._unread = app, unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        abort: Callable[[], None] = scope["state"][ABORT]

        def give_up(why: str) -> None:
            log.warning("a connection is ended whose client does not read", peer=str(scope["client"]), why=why)
            abort()

        with self._unread.waiting(give_up) as waiting:
            answer = _Answer(send, self._unread.reader_timeout_s, waiting, give_up)
            await self._app(scope, receive, answer.send)


class _Answer:
    """One answer on its way out."""

    def __init__(self, send: Send, limit_s: float, waiting: Waiting, give_up: Callable[[str], None]) -> None:
        self._send, self._limit_s, self._waiting, self._give_up = send, limit_s, waiting, give_up
        self._over = False

    async def send(self, message: Message) -> None:
        """Send a message in pieces; nothing more once the client has had its time."""
        body: bytes = message.get("body", b"")
        self._waiting.add(len(body))
        for at in range(0, len(body), PIECE) if len(body) > PIECE else (0,):
            if self._over:
                return
            piece, more = body[at : at + PIECE], at + PIECE < len(body) or message.get("more_body", False)
            await self._in_time(message if piece is body else {**message, "body": piece, "more_body": more})
            self._waiting.take(len(piece))

    async def _in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await self._send(message)
        except TimeoutError:
            self._over = True
            self._give_up(f"it took nothing for {self._limit_s:g} s, which is --reader-timeout")
