"""Which web pages may call: a browser sends what any page asks for, also to a gateway on its own machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from bagel.deployment.http_front import HttpFront
from bagel.rpc.api_keys import is_local
from bagel.telemetry.logs import REQUEST_ID
from bagel_gateway.metrics import Metrics
from bagel_gateway.rest.dialect import NOTES
from bagel_gateway.rest.errors import ForeignOrigin, WrongHost
from bagel_gateway.rest.refusals import READS, refuse

SAFE = (*READS, "OPTIONS")
"""Methods that do no work here."""
ANY = "*"
_PORTS = {"http": ":80", "https": ":443"}
_HOST = re.compile(r"(\[[^\[\]]+\]|[^\s:@/\[\]]+)(?::[0-9]*)?")


def guard_origins(app: ASGIApp, listen: str, guards: HttpFront, metrics: Metrics) -> ASGIApp:
    """The application behind all checks of who asks for it. listen: the host:port that the front is bound to."""
    app = CheckOrigin(app, guards.allow_origins, metrics)
    if guards.allow_origins:  # outside of all that refuses, so that a page can read why
        app = CORSMiddleware(
            app,
            allow_origins=guards.allow_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=(ANY,),
            expose_headers=(REQUEST_ID, "Retry-After", NOTES),
            allow_private_network=True,
        )
    return CheckHost(app, listen, guards.allow_hosts, metrics)


class CheckHost:
    """ASGI middleware: a front on loopback answers to the names of loopback and those allowed, and to no other.

    A page that has rebound its own name to this machine is of the same origin for its browser; its name gives it away.
    A front that others can reach cannot know its names: it takes any, unless some are allowed; then those, and
    addresses, as nobody can rebind them.
    """

    def __init__(self, app: ASGIApp, listen: str, allowed: tuple[str, ...], metrics: Metrics) -> None:
        self._app, self._metrics, self._allowed = app, metrics, frozenset(allowed)
        self._local = is_local(listen)
        self._any = ANY in allowed or not (self._local or allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and not self._any:
            # Without any it is HTTP/1.0, which no browser speaks.
            for host in (value.decode("latin-1") for name, value in scope["headers"] if name == b"host"):
                if not self._is_ours(host):
                    self._metrics.http("to another host", WrongHost.http_status)
                    await refuse(self._wrong(host), scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        if name in self._allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ip_address(name.strip("[]")).is_loopback or not self._local
        except ValueError:
            return False

    def _wrong(self, host: str) -> WrongHost:
        own = "localhost" if self._local else "its address"
        problem = f"this server is not called {host!r:.200}; call it by {own}, or have its operator allow the name"
        return WrongHost(f"{problem}: --allow-host {_name(host)[:200] or 'NAME'}")


class CheckOrigin:
    """ASGI middleware: a request that does work comes from no page, from a page of ours, or from one that is allowed.

    Browsers say so by Sec-Fetch-Site (over https and on localhost), and by Origin: then a page is ours if its host is
    the one that is called.
    """

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...], metrics: Metrics) -> None:
        self._app, self._allowed, self._metrics = app, frozenset(allowed), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] not in SAFE:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            if not self._may_call(headers):
                self._metrics.http("from another site", ForeignOrigin.http_status)
                await refuse(_foreign(headers.get("origin")), scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _may_call(self, headers: Mapping[str, str]) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        # Asked first, since a page of an allowed origin is cross-site by Sec-Fetch-Site.
        if origin is not None and (origin in self._allowed or ANY in self._allowed):
            return True
        if site is not None:
            # "none" is a person's own doing, such as an address that was typed in.
            return site in ("same-origin", "none")
        return origin is None or _is_of(origin, headers.get("host", "").lower())


def _name(host: str) -> str:
    """The name or address in a Host header, nothing where it is none."""
    match = _HOST.fullmatch(host.lower())
    return match[1].removesuffix(".") if match else ""


def _is_of(origin: str, host: str) -> bool:
    """Whether a page is of the host that is called. Its origin leaves out the scheme's port, a proxy may tell it."""
    scheme, _, place = origin.partition("://")
    return place in (host, host.removesuffix(_PORTS.get(scheme, "")))


def _foreign(origin: str | None) -> ForeignOrigin:
    if origin in (None, "null"):
        why = "pages of another site may not call this server; its operator allows them by --allow-origin ORIGIN"
        return ForeignOrigin(why)
    why = f"pages of {origin:.200} may not call this server; its operator allows them by --allow-origin {origin:.200}"
    return ForeignOrigin(f"{why}; if they are its own, behind a reverse proxy, have that pass on Host")
