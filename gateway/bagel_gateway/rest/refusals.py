"""Answers to requests that are refused before anything of them is read."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

from bagel.errors import BagelError, Busy
from bagel.telemetry.logs import Log
from bagel_gateway.rest.errors import error_response

READS = ("GET", "HEAD")
LINGER_S, SILENCE_S = 30.0, 2.0
"""How long a refused client may go on sending, in all and between two pieces."""

log = Log("bagel_gateway.rest")


async def refuse(error: BagelError, scope: Scope, receive: Receive, send: Send, *, linger: bool = True) -> None:
    """Answer with an error and end the connection; with `linger` once the client has ceased to send."""
    path, peer = scope["path"][:200], str(scope["client"])
    log.info("refused", method=scope["method"], path=path, peer=peer, error=str(error))
    response = error_response(error)
    response.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    # Left open, so that the connection stays until the client has ceased to send.
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if linger:
        await _linger(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _linger(receive: Receive) -> None:
    """Drop what the client still sends: closed on at once, it would hear of a broken connection, not of the error."""
    with suppress(TimeoutError, Busy):  # the second when its place is needed
        async with asyncio.timeout(LINGER_S):
            message: Message = {"more_body": True}
            while message.get("more_body", False):
                async with asyncio.timeout(SILENCE_S):
                    message = await receive()
