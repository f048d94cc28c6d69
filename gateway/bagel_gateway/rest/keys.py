"""API keys over HTTP: whatever route there is or will be needs one, but for a short list."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel.errors import Unauthenticated
from bagel.keys import AUTHORIZATION
from bagel.telemetry import Log, current_caller
from bagel_gateway.keys import Keys
from bagel_gateway.metrics import Metrics
from bagel_gateway.playground import PREFIX, STATIC
from bagel_gateway.rest.errors import error_response

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/", *(f"{PREFIX}/{file.name}" for file in STATIC.iterdir())})
"""Probes have no key; the playground's page is where a person gives theirs, and its files are the same for everyone."""
READS = ("GET", "HEAD")
LINGER_S, SILENCE_S = 30.0, 2.0
"""How long a refused client may go on sending, in all and between two pieces."""

log = Log("bagel_gateway.rest")


class RequireKey:
    """ASGI middleware, the outermost: a request without a known key is answered before its body is read."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, whose logs carry the key's name. Of HTTP alone: nothing else is let through."""
        if scope["type"] != "http":
            return
        shown = [value for name, value in scope["headers"] if name == AUTHORIZATION.encode()]
        try:
            current_caller.set(self._keys.ring.check(shown))
        except Unauthenticated as error:
            if not _is_open(scope):
                await self._refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refuse(self, error: Unauthenticated, scope: Scope, receive: Receive, send: Send) -> None:
        path, peer = scope["path"][:200], str(scope["client"])
        log.info("refused", method=scope["method"], path=path, peer=peer, error=str(error))
        self._metrics.http("without a key", 401)
        response = error_response(error)
        response.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        await _linger(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _linger(receive: Receive) -> None:
    """Drop what the client still sends: closed on at once, it would be told of a broken connection, not of the key."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            message: Message = {"more_body": True}
            while message.get("more_body", False):
                async with asyncio.timeout(SILENCE_S):
                    message = await receive()


def _is_open(scope: Scope) -> bool:
    return scope["method"] in READS and scope["path"] in OPEN_PATHS
