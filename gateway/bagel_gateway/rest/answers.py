"""Answers that end with their client: a client that leaves cancels the work. Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bagel.errors import BagelError
from bagel.telemetry.logs import Log
from bagel.telemetry.tracing import record_request_failure
from bagel_gateway.rest.errors import ClientGone, error_body, status_of

T = TypeVar("T")
Payload = Mapping[str, Any] | str
"""What one server-sent event says: an object, named by its `type` if it has one, or a text."""

log = Log("bagel_gateway.rest")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to; ClientGone, and the work cancelled, if the client leaves before.

    The request's body must have been read.
    """
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def event_stream(request: Request, events: AsyncGenerator[Payload, None]) -> Response:
    """A response that streams events. What fails before the first of them is raised, and so has a status of its own."""
    try:
        first = await unless_gone(request, _first(events))
    except BaseException:
        # There will be no EventStream to close them.
        await events.aclose()
        raise
    return EventStream(first, events)


class EventStream(Response):
    """Server-sent events until they end or the client leaves; an error on the way is the last event."""

    media_type = "text/event-stream"

    def __init__(self, first: Payload, events: AsyncGenerator[Payload, None]) -> None:
        # A proxy like nginx would hold the events back without X-Accel-Buffering.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Starlette has set the length of an empty body; a stream has none.
        del self.headers["content-length"]
        self._first, self._events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        sending, leaving = asyncio.create_task(self._send(send)), asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            outcomes = await asyncio.gather(sending, leaving, return_exceptions=True)
        if isinstance(outcomes[0], asyncio.CancelledError):  # the client has left, which is no failure
            record_request_failure(outcomes[0])
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        # An OSError means that the client's connection broke, which is no failure of ours.
        if isinstance(outcomes[0], Exception) and not isinstance(outcomes[0], OSError):
            raise outcomes[0]

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_event(send, self._first)
            try:
                async for payload in self._events:
                    await _send_event(send, payload)
            except BagelError as error:
                log.info("failed", **error.for_log())
                record_request_failure(error, fault=status_of(error) >= 500)
                await _send_event(send, {**error_body(error), "type": "error"})
            except Exception as error:
                log.error("internal error", exc_info=True)
                record_request_failure(error)
                failure = BagelError(f"internal error: {type(error).__name__}; the log of this service has the details")
                await _send_event(send, {**error_body(failure), "type": "error"})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _first(events: AsyncGenerator[Payload, None]) -> Payload:
    return await anext(events)


async def _send_event(send: Send, payload: Payload) -> None:
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {payload['type']}\n" if not isinstance(payload, str) and "type" in payload else ""
    await send({"type": "http.response.body", "body": f"{name}data: {text}\n\n".encode(), "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
