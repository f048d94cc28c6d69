"""Certificates of callers over HTTP: every route but the probes needs one with an allowed name."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from bagel.errors import Forbidden
from bagel.rpc.security import Security
from bagel_gateway.metrics import Metrics
from bagel_gateway.rest.pieces import Abortable
from bagel_gateway.rest.refusals import READS, refuse

CERTIFICATE = "bagel.certificate"
PROBES = frozenset({"/healthz", "/health", "/readyz"})


class Certified(Abortable):
    """uvicorn's connection, whose requests know the names in its caller's certificate."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read them; there are none without TLS, or where no certificate was asked for."""
        super().connection_made(transport)
        shown = transport.get_extra_info("peercert") or {}
        subject = [field for group in shown.get("subject", ()) for field in group]
        names = [value for _, value in shown.get("subjectAltName", ())]
        names += [value for kind, value in subject if kind == "commonName"]
        self.app_state = {**self.app_state, CERTIFICATE: list(dict.fromkeys(filter(None, names)))}


class RequireName:
    """ASGI middleware: refuses a caller whose certificate has no allowed name, before its body is read."""

    def __init__(self, app: ASGIApp, security: Security, metrics: Metrics) -> None:
        self._app, self._security, self._metrics = app, security, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Of HTTP alone: nothing else is let through."""
        if scope["type"] != "http":
            return
        try:
            self._security.check_names(scope["state"][CERTIFICATE])
        except Forbidden as error:
            # Probes may have no certificate with an allowed name.
            if not (scope["method"] in READS and scope["path"] in PROBES):
                self._metrics.http("without an allowed certificate", 403)
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)
