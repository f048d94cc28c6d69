"""The playground: one page at `/`, its files beside this one, nothing to build and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"
PREFIX = "/playground"
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Nothing to other sites; to this one, as some browsers leave out Origin as well where no referrer is sent.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time; the files' ETags make that cheap
}


_GRPC = '<meta name="grpc" content="{}">'


@dataclass(frozen=True)
class GrpcFront:
    """Where the same gateway speaks gRPC, for code to copy: the host is the page's own."""

    port: int
    tls: bool

    def __str__(self) -> str:
        return f"{self.port} {'tls' if self.tls else 'plaintext'}"


def add_playground(app: FastAPI, grpc: GrpcFront) -> None:
    """Serve the page at `/`, with the gateway's gRPC port in it, and its files under `/playground`."""
    html = (STATIC / "index.html").read_text(encoding="utf-8").replace(_GRPC.format(""), _GRPC.format(grpc))

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=dict(HEADERS))

    app.mount(PREFIX, _Files(directory=STATIC), name="playground")


class _Files(StaticFiles):
    """Static files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
