"""API keys over HTTP: whatever route there is or will be needs one, but for a short list."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from bagel.errors import Unauthenticated
from bagel.rpc.api_keys import AUTHORIZATION
from bagel.telemetry.logs import current_caller
from bagel_gateway.keys import Keys
from bagel_gateway.metrics import Metrics
from bagel_gateway.playground import PREFIX, STATIC
from bagel_gateway.rest.refusals import READS, refuse

OPEN_PATHS = frozenset({"/healthz", "/health", "/readyz", "/", *(f"{PREFIX}/{file.name}" for file in STATIC.iterdir())})
"""Probes have no key; the playground's page is where a person gives theirs, and its files are the same for everyone."""


class RequireKey:
    """ASGI middleware: a request without a known key is answered before its body is read."""

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
            # Asked after the key, so that a probe that shows one is served as its caller.
            if not _is_open(scope):
                self._metrics.http("without a key", 401)
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    return scope["method"] in READS and scope["path"] in OPEN_PATHS
