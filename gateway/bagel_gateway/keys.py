"""API keys at the gateway: a file that is followed as it changes, and the gRPC calls that it lets through."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from bagel.errors import ConfigError, Unauthenticated
from bagel.rpc.api_keys import AUTHORIZATION, KeyRing, read_keys
from bagel.rpc.errors import abort
from bagel.rpc.guard import HEALTH_METHODS
from bagel.telemetry.logs import Log, current_caller

LOOK_EVERY_S = 1.0
OPEN_METHODS = HEALTH_METHODS
"""Methods for health probes, which have no key. All others need one, also those that are added later."""

Continue = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]

log = Log("bagel_gateway.keys")


class Keys:
    """The keys of a file. Raises ConfigError for one that cannot be used.

    ring: the keys known now; it follows the file while `watch` runs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ring, self._data = read_keys(path)
        self._problem = ""

    async def watch(self) -> None:
        """Follow the file until cancelled, by its content: the times of a mounted file say little.

        A file that cannot be used changes nothing: it may be half written, and must lock no one out.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                # In a thread, since reading a file blocks the event loop.
                ring, data = await asyncio.to_thread(read_keys, self._path)
            except ConfigError as error:
                self._report(str(error))
                continue
            except Exception:  # a bug; without the watch no key could be revoked
                log.error("looking at the API keys failed", exc_info=True)
                continue
            self._problem = ""
            if data != self._data:
                self._take(ring, data)

    def _take(self, ring: KeyRing, data: bytes) -> None:
        before, after = set(self.ring.names), set(ring.names)
        self.ring, self._data = ring, data
        log.info("API keys changed", known=len(after), added=sorted(after - before), removed=sorted(before - after))

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            log.error("the API keys cannot be read again; those read last stay in force", problem=problem)
        self._problem = problem


class KeyInterceptor(aio.ServerInterceptor):
    """Lets a call through that shows a known key; any other is UNAUTHENTICATED before its request is read."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The call's own handler, or one that refuses it. Logs of the call carry the key's name from now on."""
        if details.method in OPEN_METHODS:
            return await continuation(details)
        shown = [value for name, value in details.invocation_metadata or () if name == AUTHORIZATION]
        try:
            current_caller.set(self._keys.ring.check(shown))
        except Unauthenticated as error:
            return _refusing(error, details.method)
        return await continuation(details)


def _refusing(error: Unauthenticated, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(requests: Any, context: aio.ServicerContext[Any, Any]) -> None:
        log.info("refused", method=method, peer=context.peer(), error=str(error))
        await abort(context, error)

    # A handler of streams for any method: only those are called before the request has arrived.
    return grpc.stream_stream_rpc_method_handler(refuse)
