"""A gRPC server that goes on where grpc.aio's own has ended. No torch here.

grpc.aio (1.85) decodes the method name of a call in the one loop that takes all calls. A name that is no UTF-8, as of a
damaged or a hostile call, ends this loop, and the server closes its port while the process lives on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc import aio

from bagel.telemetry.logs import Log

LOOK_S = 0.1
"""How often a server is looked at, and its port tried again."""

log = Log("bagel.transport")


class LastingServer:
    """As grpc.aio.Server, for one port. Calls under way go on when the server is made anew; connections do not."""

    def __init__(self, options: Sequence[tuple[str, int]], interceptors: Sequence[aio.ServerInterceptor]) -> None:
        self._options, self._interceptors = tuple(options), tuple(interceptors)
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._registered: list[tuple[str, Mapping[str, Any]]] = []
        self._host, self._port = "", 0
        self._credentials: grpc.ServerCredentials | None = None
        self._server = self._make()
        self._watching: asyncio.Task[None] | None = None

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As grpc.aio.Server has it."""
        self._handlers += handlers
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """As grpc.aio.Server has it, before `start`."""
        self._registered.append((service, handlers))
        _register(self._server, service, handlers)

    def add_insecure_port(self, address: str) -> int:
        """The port that is listened on; RuntimeError if it cannot be."""
        return self._listen(address, None)

    def add_secure_port(self, address: str, credentials: grpc.ServerCredentials) -> int:
        """The port that is listened on; RuntimeError if it cannot be."""
        return self._listen(address, credentials)

    async def start(self) -> None:
        """Take calls until `stop`."""
        await self._server.start()
        self._watching = asyncio.create_task(self._watch(), name="watch the gRPC server")

    async def stop(self, grace: float | None) -> None:
        """Take no calls any more; those under way have so many seconds."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        with suppress(UnicodeDecodeError):  # what has just ended it, which its stop raises once more
            await self._server.stop(grace)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if not _runs(self._server):
                await self._start_again()

    async def _start_again(self) -> None:
        server = self._make()
        for service, handlers in self._registered:
            _register(server, service, handlers)
        server.add_generic_rpc_handlers(tuple(self._handlers))
        try:
            _bind(server, f"{self._host}:{self._port}", self._credentials)
        except RuntimeError as error:  # the next look tries again
            log.error("the gRPC server has ended, and its port cannot be opened again yet", error=str(error))
            return
        await server.start()
        self._server = server
        log.error("the gRPC server had ended, as by a method name that is no UTF-8; it was made anew", port=self._port)

    def _make(self) -> aio.Server:
        return aio.server(options=self._options, interceptors=self._interceptors)

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        self._host, self._credentials = address.rpartition(":")[0], credentials
        self._port = _bind(self._server, address, credentials)
        return self._port


def _bind(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    return server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)


def _register(server: aio.Server, service: str, handlers: Mapping[str, Any]) -> None:
    # Not in the stubs of its types.
    untyped: Any = server
    untyped.add_registered_method_handlers(service, handlers)


def _runs(server: aio.Server) -> bool:
    # grpc.aio does not tell: wait_for_termination waits for ever then.
    untyped: Any = server
    return bool(untyped._server.is_running())
