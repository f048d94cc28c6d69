"""One way to make a channel and one way to run a server, for every hop. No torch here."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, cast

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from bagel.errors import BagelError, ConfigError, InvalidRequest, Loading
from bagel.rpc.errors import abort, decoding
from bagel.rpc.guard import Guard
from bagel.rpc.health import HEALTH, NOT_SERVING, Health
from bagel.rpc.integrity import CURRENT, Digest, Received, receiving
from bagel.rpc.lasting_server import LastingServer
from bagel.rpc.limits import DRAIN_S, MAX_MESSAGE_BYTES, Limits
from bagel.rpc.reach import why_not_free
from bagel.rpc.security import PLAINTEXT, Security
from bagel.rpc.unread import Unread
from bagel.rpc.writing import writing
from bagel.telemetry.logs import Log

__all__ = [
    "PLAINTEXT",
    "Host",
    "LateMethods",
    "Limits",
    "Security",
    "channel",
    "sync_channel",
]

IDLE_CHECK_S = 0.05
_PING = 10_000
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _PING),
    ("grpc.keepalive_timeout_ms", _PING // 2),
    # A damaged length makes the peer take all that follows for one frame. Its own pings still come, which is life
    # enough for the two above: only the answer to a ping shows that it understands us.
    ("grpc.http2.ping_timeout_ms", _PING),
    # A connection without calls is watched too, so that a lost peer is noticed before the next call.
    ("grpc.keepalive_permit_without_calls", 1),
    # 0 is no limit: a call may wait for long, with nothing but pings on its connection.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In truth how long an attempt may take, TLS and a busy peer included; the time between attempts is the other two's.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Channels of one process to one address would share a connection, and with it its flow control.
    ("grpc.use_local_subchannel_pool", 1),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _PING),
    ("grpc.keepalive_timeout_ms", _PING // 2),
    ("grpc.http2.ping_timeout_ms", _PING),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING // 2),
    # 0 is no limit: a server must not end the connection of a peer that pings as CHANNEL_OPTIONS say.
    ("grpc.http2.max_ping_strikes", 0),
    # A second service would be let onto a port in use otherwise, and get some of its calls.
    ("grpc.so_reuseport", 0),
)

Receive = Callable[[Any], AbstractAsyncContextManager[list[bytes]]]
"""Receives the one message of a call, by its context, into a list to be taken out of."""

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

log = Log("bagel.transport")


def channel(target: str, security: Security = PLAINTEXT, server_name: str | None = None) -> aio.Channel:
    """A channel to a service's host:port. server_name: what its certificate must be for, in place of that host."""
    credentials = security.channel_credentials()
    if credentials is None:
        return aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    return aio.secure_channel(target, credentials, options=(*CHANNEL_OPTIONS, *_expecting(server_name)))


def sync_channel(target: str, security: Security = PLAINTEXT, server_name: str | None = None) -> grpc.Channel:
    """As `channel`, for threads."""
    credentials = security.channel_credentials()
    if credentials is None:
        return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(target, credentials, options=(*CHANNEL_OPTIONS, *_expecting(server_name)))


def _expecting(server_name: str | None) -> tuple[tuple[str, str], ...]:
    return () if server_name is None else (("grpc.ssl_target_name_override", server_name),)


class LateMethods(grpc.GenericRpcHandler):
    """What `add_…Servicer_to_server` is called with in place of a server; calls before that are UNAVAILABLE.

    Every method of a servicer is one of `bagel.rpc.errors`'s `unary` or `streaming`.
    """

    def __init__(self, services: Sequence[str], unread: Unread, receive: Receive | None = None) -> None:
        self._services, self._unread, self._receive = tuple(services), unread, receive
        self._handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Take a servicer's handlers."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, object]) -> None:
        """The same handlers once more, in the form that a server takes before it starts only."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call."""
        for handler in self._handlers:
            if (found := handler.service(details)) is not None:
                return _guarded(found, str(details.method), self._unread, self._receive)
        service = str(details.method).strip("/").partition("/")[0]
        if service in self._services and not self._handlers:
            return grpc.unary_unary_rpc_method_handler(_loading)
        return None


def _guarded(
    found: grpc.RpcMethodHandler[Any, Any], method: str, unread: Unread, receive: Receive | None
) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler, for requests that are no message or may be large, and for clients that do not read."""
    handler = cast(Any, found)  # of its fields, those of its kind are not None
    read, serialize = receiving(decoding(handler.request_deserializer), method), handler.response_serializer
    if handler.response_streaming:
        write = writing(handler.unary_stream, unread, serialize)
        if receive is not None:
            return grpc.stream_stream_rpc_method_handler(_received(write, read, receive, method), None, None)
        return grpc.unary_stream_rpc_method_handler(write, read, None)
    return grpc.unary_unary_rpc_method_handler(_answering(handler.unary_unary, serialize), read, None)


def _answering(
    method: Callable[[Any, Any], Awaitable[Any]], serialize: Callable[[Any], bytes] | None
) -> Callable[[Received, Any], Awaitable[bytes]]:
    """A servicer's unary method, with the digest of both messages at its end."""

    async def answer(received: Received, context: aio.ServicerContext[Any, Any]) -> bytes:
        CURRENT.set(received.digest)
        response = await method(received.message, context)
        data = response if serialize is None else serialize(response)
        received.digest.add(data)
        context.set_trailing_metadata(received.digest.metadata)
        return data

    return answer


def _received(
    write: Callable[[Received, Any], Awaitable[None]], read: Callable[[bytes], Received], receive: Receive, method: str
) -> Callable[[Any, Any], Awaitable[None]]:
    """A handler of a stream whose one message is received as `receive` does it; the same on the wire."""

    async def handle(_: Any, context: aio.ServicerContext[Any, Any]) -> None:
        try:
            async with receive(context) as message:
                await write(read(message.pop()), context)
        except BagelError as error:
            if CURRENT.get() is None and isinstance(error, InvalidRequest):
                CURRENT.set(Digest(method))  # of no message: who has sent one sees by it that it was lost
            await abort(context, error)

    return handle


async def _loading(request: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
    await abort(context, Loading("the service is loading its model; try again when grpc.health.v1 says SERVING"))
    return b""


def _reflection_v1(servicer: Any) -> grpc.GenericRpcHandler:
    """grpc.reflection.v1, which is v1alpha under another name and which the library does not have yet.

    It is not listed among the services: a client that asks for the file of each listed service would find none.
    """
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": method})


class Host:
    """A gRPC server with health (NOT_SERVING while loading and draining) and reflection.

    services: the full names of what is served. Servicers are added to `methods`, also after `start`: a model loads for
    minutes, and its service's address and health are to be known meanwhile. interceptors see every call, also one of a
    method that there is not. unread: what may wait for clients that read slowly; limits: of what callers may hold;
    receive: takes in the requests that are answered by streams, which may be large, and holds them while they are
    served.
    """

    def __init__(
        self,
        address: str,
        services: Sequence[str],
        security: Security = PLAINTEXT,
        interceptors: Sequence[aio.ServerInterceptor] = (),
        unread: Unread | None = None,
        limits: Limits | None = None,
        receive: Receive | None = None,
    ) -> None:
        credentials, limits = security.server_credentials(), limits or Limits()
        self.unread = Unread() if unread is None else unread
        guard = Guard(security, limits)
        # The guard comes last: a call without an API key is refused before it reads anything.
        server = LastingServer((*SERVER_OPTIONS, *limits.options()), (*interceptors, guard))
        self.server = cast(aio.Server, server)
        self._methods = LateMethods(services, self.unread, receive)
        self.server.add_generic_rpc_handlers((self._methods,))
        self.draining = asyncio.Event()
        self._health = Health(services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflected = reflection.aio.ReflectionServicer((*services, HEALTH, reflection.SERVICE_NAME))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, self.server)
        self.server.add_generic_rpc_handlers((_reflection_v1(reflected),))
        try:
            if credentials is None:
                self.port = self.server.add_insecure_port(address)
            else:
                self.port = self.server.add_secure_port(address, credentials)
        except RuntimeError as error:
            why = why_not_free(address) or str(error)
            raise ConfigError(f"{address} cannot be listened on: {why}; choose another with --listen") from None

    @property
    def methods(self) -> aio.Server:
        """What servicers are added to; of a server it has only what that takes."""
        return cast(aio.Server, self._methods)

    async def start(self) -> None:
        """Listen; health says NOT_SERVING until `ready`."""
        await self.server.start()

    async def ready(self) -> None:
        """Health says SERVING."""
        self._health.set(health_pb2.HealthCheckResponse.SERVING)

    async def not_ready(self) -> None:
        """Health says NOT_SERVING, as after the loss of what serves."""
        self._health.set(NOT_SERVING)

    async def until_stopped(self, drain_s: float = DRAIN_S, idle: Callable[[], bool] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then `drain`; a second signal ends what is under way at once."""
        loop, stop, stop_now = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, lambda: (stop_now if stop.is_set() else stop).set())
        await stop.wait()
        draining, hurrying = asyncio.create_task(self.drain(drain_s, idle)), asyncio.create_task(stop_now.wait())
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            log.warning("stopping at once", why="a second signal")
            draining.cancel()
            await self.server.stop(None)
        hurrying.cancel()
        with suppress(asyncio.CancelledError):
            await draining

    async def drain(self, drain_s: float = DRAIN_S, idle: Callable[[], bool] | None = None) -> None:
        """Refuse new requests, wait for those under way, end those that take longer than drain_s.

        With `idle`, all calls are served until it says True: the servicers refuse by themselves what begins something
        new (`draining` is set), and go on with what belongs to requests under way.
        """
        log.info("draining", seconds=drain_s)
        deadline = time.monotonic() + drain_s
        self.draining.set()
        self._health.end()
        while idle is not None and not idle() and time.monotonic() < deadline:
            await asyncio.sleep(IDLE_CHECK_S)
        await self.server.stop(max(deadline - time.monotonic(), 0))
