"""A gRPC channel to a servicer on the same event loop: real handlers and statuses, no sockets, faults at will."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc.aio import AioRpcError, Metadata

from bagel.kv.service import KvBlocksServicer

Damage = Callable[[bytes], bytes | None]
"""What becomes of a message: other bytes, or None where it is lost."""
BUFFERED = 2
"""Messages that are under way before a sender waits for its reader."""


class Aborted(Exception):
    """Ends a handler, as a real context's abort does."""


class CallContext:
    """As much of a `ServicerContext` as the servicer's handlers use."""

    def __init__(self) -> None:
        self.trailing = Metadata()
        self.status = (grpc.StatusCode.UNKNOWN, "the handler raised")

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self.trailing = metadata

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.status = (code, details)
        raise Aborted

    def error(self) -> AioRpcError:
        return AioRpcError(self.status[0], Metadata(), self.trailing, details=self.status[1])


class Stream:
    """One call of `Pull`, with a buffer between the handler's task and the reader."""

    def __init__(self, link: Link, request: Any) -> None:
        self._link, self._context, self._request = link, CallContext(), request
        self.wanted = True
        self._buffer: asyncio.Queue[bytes | AioRpcError | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(BUFFERED)
        self._handler = asyncio.get_running_loop().create_task(self._serve(request))
        link.streams.append(self)
        # Not by the handler itself: one that is cancelled before it begins does not run.
        self._handler.add_done_callback(lambda _: link.streams.remove(self))

    async def read(self) -> Any:
        message = await self._buffer.get()
        self._room.release()
        if isinstance(message, AioRpcError):
            raise message
        return grpc.aio.EOF if message is None else message

    def pages(self, of: Mapping[bytes, Sequence[tuple[int, int]]]) -> list[tuple[bytes, tuple[int, int]]]:
        """What this call has asked for, as (digest, (layer, token begin)); of: all pages of each segment."""
        whole = [(digest, page) for digest in self._request.digests for page in of[digest]]
        return whole + [(each.digest, (each.layer, each.token_begin)) for each in self._request.pages]

    def cancel(self) -> None:
        self.wanted = False
        self._handler.cancel()

    def cut(self) -> None:
        """Lose the connection: the reader gets a status without details, the handler is cancelled."""
        if not self._handler.done():
            self.wanted = False
            self._handler.cancel()
            self._buffer.put_nowait(AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "cut"))

    async def _serve(self, request: Any) -> None:
        end: AioRpcError | None = None
        messages = self._link.servicer.Pull(request, self._context)
        try:
            async for data in messages:
                await self._room.acquire()
                if (sent := self._link.transmit(data)) is not None:
                    self._buffer.put_nowait(sent)
        except Aborted:
            end = self._context.error()
        finally:
            with suppress(Aborted):
                await messages.aclose()  # type: ignore[attr-defined]
        self._buffer.put_nowait(end)


class Link:
    """The channel to one servicer. damage: of the next messages, one each; down: calls get no connection."""

    def __init__(self, servicer: KvBlocksServicer) -> None:
        self.servicer = servicer
        self.streams: list[Stream] = []
        self.damage: list[Damage] = []
        self.down = False

    def transmit(self, data: bytes) -> bytes | None:
        return self.damage.pop(0)(data) if self.damage else data

    def unary_stream(self, path: str, **_: Any) -> Callable[..., Stream]:
        def call(request: Any, metadata: Any = None) -> Stream:
            stream = Stream(self, request)
            if self.down:
                stream.cut()
            return stream

        return call

    def unary_unary(self, path: str, **_: Any) -> Callable[..., Any]:
        handler = getattr(self.servicer, path.rpartition("/")[2])

        async def call(request: Any, timeout: float, metadata: Any = None) -> Any:
            await asyncio.sleep(0)  # what goes over a wire is never answered at once
            if self.down:
                raise AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "down")
            context = CallContext()
            try:
                return await handler(request, context)
            except Aborted:
                raise context.error() from None

        return call
