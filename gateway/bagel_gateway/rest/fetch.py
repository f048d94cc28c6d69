"""Images by URL: refused, unless their host is on the operator's list."""

from __future__ import annotations

import asyncio
import http.client
import ssl
import time
from urllib.parse import urlsplit

from bagel.errors import InvalidImage

TIMEOUT_S = 10.0
_PIECE = 2**16


class Fetcher:
    """Fetches https images of `hosts` alone; redirects are not followed. max_bytes: of one image."""

    def __init__(self, hosts: tuple[str, ...], max_bytes: int, tls: ssl.SSLContext | None = None) -> None:
        self._hosts, self._max = frozenset(host.lower() for host in hosts), max_bytes
        self._tls = tls
        self._at_once = asyncio.Semaphore(4)

    async def fetch(self, url: str) -> bytes:
        """The image's file; raises InvalidImage if it may not be fetched, or cannot be."""
        if not self._hosts:
            raise InvalidImage("messages", "image URLs are refused here; send the image as a data URL with base64")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or 443
        except ValueError:
            raise InvalidImage("messages", f"{url!r:.80} is no URL") from None
        named = host if port == 443 else f"{host}:{port}"
        if parts.scheme != "https" or parts.username is not None or named not in self._hosts:
            allowed = ", ".join(sorted(self._hosts))
            raise InvalidImage("messages", f"images are fetched by https from these hosts alone: {allowed}")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if any(ord(letter) <= 32 or ord(letter) > 126 for letter in path):
            raise InvalidImage("messages", "an image's URL has characters that must be percent-encoded")
        async with self._at_once:
            return await asyncio.to_thread(self._get, host, port, path)

    def _get(self, host: str, port: int, path: str) -> bytes:
        # The socket's timeout bounds a single read; this bounds a server that sends a few bytes at a time.
        deadline = time.monotonic() + TIMEOUT_S
        # This client follows no redirects, which could lead to a host that is not on the list.
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._tls)
        try:
            connection.request("GET", path, headers={"User-Agent": "bagel-serving", "Accept": "image/*"})
            with connection.getresponse() as response:
                if response.status != 200:
                    problem = f"{host} answered {response.status} for an image; redirects are not followed"
                    raise InvalidImage("messages", problem)
                return self._body(response, host, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise InvalidImage("messages", f"an image cannot be fetched from {host}: {type(error).__name__}") from None
        finally:
            connection.close()

    def _body(self, response: http.client.HTTPResponse, host: str, deadline: float) -> bytes:
        body = bytearray()
        while piece := response.read1(_PIECE):
            body += piece
            if len(body) > self._max:
                raise InvalidImage("messages", f"an image of {host} has more than {self._max} bytes")
            if time.monotonic() > deadline:
                raise InvalidImage("messages", f"{host} takes more than {TIMEOUT_S:g} s for an image")
        return bytes(body)
