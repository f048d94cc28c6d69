"""What every gRPC call passes before its servicer: whose it is, how long its message may take, how many streams idle.

No torch here.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from grpc import aio

from bagel.errors import Busy, Forbidden, InvalidRequest
from bagel.rpc.errors import Undecodable, abort, decoding
from bagel.rpc.health import HEALTH
from bagel.rpc.limits import Limits
from bagel.rpc.security import Security, names_of
from bagel.telemetry.logs import Log

HEALTH_METHODS = frozenset({f"/{HEALTH}/Check", f"/{HEALTH}/Watch"})
"""What a probe calls: it has no key, and its certificate may be any of the CA's."""
WATCH = f"/{HEALTH}/Watch"
_REFLECTION = "/grpc.reflection."
RETRY_S = 30.0
_OF_ONE_CALLER = 4
"""A caller gets at most one in so many of the streams that may idle."""

Handler = Any  # grpc.RpcMethodHandler has no parameters where it runs
Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]
Serve = Callable[[Any], Awaitable[None]]

log = Log("bagel.guard")


class Guard(aio.ServerInterceptor):
    """Checks the caller before a request is read, and bounds what a caller can hold without asking for anything."""

    def __init__(self, security: Security, limits: Limits) -> None:
        self._security, self._limits = security, limits
        self._watching: Counter[str] = Counter()

    async def intercept_service(self, continuation: Continue, details: grpc.HandlerCallDetails) -> Handler:
        """The call's own handler, behind the checks."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = str(details.method)
        if handler.request_streaming:
            serve = self._asked_again(handler) if method.startswith(_REFLECTION) else _reading_itself(handler)
        else:
            serve = self._single(handler, method)

        async def guarded(requests: AsyncIterator[Any], context: Any) -> None:
            try:
                if method not in HEALTH_METHODS:
                    await self._check_caller(context, method)
                await serve(context)
            except BaseException as error:
                _forget_locals(error)
                raise

        # Of streams, whatever the method: only their handlers are called before a request has come in.
        read, write = handler.request_deserializer, handler.response_serializer
        return grpc.stream_stream_rpc_method_handler(guarded, decoding(read) if read else None, write)

    async def _check_caller(self, context: Any, method: str) -> None:
        if not self._security.clients:
            return
        try:
            self._security.check_names(names_of(context.auth_context()))
        except Forbidden as error:
            log.warning("refused", method=method, peer=context.peer(), error=str(error))
            await abort(context, error)

    def _single(self, handler: Handler, method: str) -> Serve:
        """Serves a method of one request."""

        async def serve(context: Any) -> None:
            request = await self._next(context)
            if request is None:
                return
            if isinstance(request, Undecodable) and method.startswith(f"/{HEALTH}/"):  # ours tell by themselves
                await abort(context, InvalidRequest("request", f"the request cannot be read: {request.why}"))
            if not handler.response_streaming:
                await context.write(await handler.unary_unary(request, context))
            elif method == WATCH:
                with self._place(context) as refused:
                    if refused is not None:
                        await abort(context, refused)
                    await _write(handler.unary_stream(request, context), context)
            else:
                await _write(handler.unary_stream(request, context), context)

        return serve

    def _asked_again(self, handler: Handler) -> Serve:
        """Serves a method of many requests, reflection's, which a caller may never end."""

        async def serve(context: Any) -> None:
            async def timed() -> AsyncIterator[Any]:
                while (request := await self._next(context)) is not None:
                    if isinstance(request, Undecodable):
                        await abort(context, InvalidRequest("request", f"the request cannot be read: {request.why}"))
                    yield request

            with self._place(context) as refused:
                if refused is not None:
                    await abort(context, refused)
                await _write(handler.stream_stream(timed(), context), context)

        return serve

    async def _next(self, context: Any) -> Any:
        """The next request of a call, None at its end; ends the call if it takes too long."""
        try:
            async with asyncio.timeout(self._limits.message_s):
                request = await context.read()
        except TimeoutError:
            why = f"no request has come within {self._limits.message_s:g} s of this call's begin or its last one"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, why)
        return None if request is aio.EOF else request

    @contextmanager
    def _place(self, context: Any) -> Iterator[Busy | None]:
        """Count a stream that may idle; gives the error to end it with if there are too many."""
        # Without the port, so that all connections of one host count together.
        caller = str(context.peer()).rpartition(":")[0]
        watches = self._limits.watches
        own = max(1, watches // _OF_ONE_CALLER)
        if self._watching.total() >= watches or self._watching[caller] >= own:
            why = f"{watches} streams may watch or reflect at once, {own} of one caller, and as many do; end some first"
            yield Busy(why, RETRY_S)
            return
        self._watching[caller] += 1
        try:
            yield None
        finally:
            self._watching[caller] -= 1
            # The table would keep every caller that ever watched otherwise.
            if not self._watching[caller]:
                del self._watching[caller]


def _reading_itself(handler: Handler) -> Serve:
    """Serves a method that takes its one request from the call, in its own time."""

    async def serve(context: Any) -> None:
        await _write(handler.stream_stream(None, context), context)

    return serve


def _forget_locals(error: BaseException) -> None:
    """Empty the frames that an error has passed, and those of the errors that it came from.

    gRPC keeps what a call ended with in a cycle: the request and its images would stay until the next full collection.
    """
    found, left = set[int](), [error]
    while left:
        each = left.pop()
        if id(each) in found:
            continue
        found.add(id(each))
        traceback.clear_frames(each.__traceback__)
        left += [came_from for came_from in (each.__context__, each.__cause__) if came_from is not None]
        left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


async def _write(responses: AsyncGenerator[Any] | Awaitable[None], context: Any) -> None:
    """Send what a servicer's method gives, or wait for one that sends by itself."""
    if not isinstance(responses, AsyncGenerator):
        await responses
        return
    async with aclosing(responses):
        async for response in responses:
            await context.write(response)
