"""uvicorn in the gateway's own event loop, beside gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from asyncio.base_events import Server
from collections.abc import Callable, Generator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.http_front import HttpFront
from bagel.errors import ConfigError
from bagel.rpc.reach import why_not_free
from bagel.rpc.transport import Security
from bagel.rpc.unread import Unread
from bagel_gateway.backends import Backends
from bagel_gateway.keys import Keys
from bagel_gateway.metrics import Metrics
from bagel_gateway.playground import GrpcFront
from bagel_gateway.rest.app import make_app
from bagel_gateway.rest.bodies import Bodies
from bagel_gateway.rest.certificates import RequireName
from bagel_gateway.rest.connections import (
    BACKLOG,
    RESERVE,
    Acceptor,
    Connection,
    Connections,
    connections_allowed,
)
from bagel_gateway.rest.crowd import Crowd
from bagel_gateway.rest.fetch import Fetcher
from bagel_gateway.rest.keys import RequireKey
from bagel_gateway.rest.limits import LimitBodies
from bagel_gateway.rest.origins import guard_origins
from bagel_gateway.rest.pieces import InPieces, send_little_ahead
from bagel_gateway.rest.serve import Front
from bagel_gateway.room import Room
from bagel_gateway.serving import Requests

LAST_ANSWERS_S = 5
"""Seconds for connections that are still written to when everything is served."""


class RestServer:
    """The REST front, from `start` to `stop`. Raises ConfigError for an address that cannot be listened on."""

    def __init__(
        self,
        config: GatewayConfig,
        security: Security,
        requests: Requests,
        metrics: Metrics,
        backends: Backends,
        draining: Callable[[], bool],
        keys: Keys | None,
        grpc_port: int,
        unread: Unread,
        room: Room,
    ) -> None:
        assert config.http is not None
        self._socket = _listen(config.http)
        self.port: int = self._socket.getsockname()[1]
        host = config.http.rpartition(":")[0]
        self.address = f"{host}:{self.port}"
        front = Front(requests, config.served_model_names, config.compat)
        most = connections_allowed(config.max_connections)
        fetcher, bodies = Fetcher(config.allow_image_hosts, config.max_body_bytes), Bodies(config)
        grpc, keyed = GrpcFront(grpc_port, tls=security.serves_tls), keys is not None
        app: ASGIApp = make_app(
            front, bodies, fetcher, metrics, backends, draining, int(time.time()), grpc, keyed=keyed
        )
        # Each layer goes around those before it, so that a caller is checked before its body is read.
        app = LimitBodies(app, config, room)
        if keys is not None:
            app = RequireKey(app, keys, metrics)
        if security.clients:
            app = RequireName(app, security, metrics)
        app = InPieces(Crowd(guard_origins(app, config.http, config, metrics), most), unread)
        self._server = _Server(_configuration(app, security, config), config, most)
        self._serving: asyncio.Task[None] | None = None

    @property
    def answering(self) -> int:
        """HTTP requests under way."""
        return len(self._server.server_state.tasks)

    async def start(self) -> None:
        """Listen."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """End; what is still under way is cancelled."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()


class _Server(uvicorn.Server):
    """Signals are the gateway's, which drains both fronts; connections are accepted by an Acceptor."""

    def __init__(self, config: uvicorn.Config, guards: HttpFront, most: int) -> None:
        super().__init__(config)
        self._guards, self._connections = guards, Connections(most + RESERVE)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the one socket."""
        assert sockets is not None
        tls, handshake_s = self.config.ssl, self._guards.header_timeout_s
        acceptor = Acceptor(sockets[0], self._connection, self._connections, tls, handshake_s)
        self.servers = [cast(Server, acceptor)]
        self.started = True

    def _connection(self) -> Connection:
        uses = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        return Connection(self._connections, self._guards, **uses)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _configuration(app: ASGIApp, security: Security, guards: HttpFront) -> uvicorn.Config:
    tls: dict[str, Any] = {}
    if security.serves_tls:
        import ssl

        tls = {"ssl_certfile": security.certificate, "ssl_keyfile": security.key}
        if security.ca is not None:
            tls |= {"ssl_ca_certs": str(security.ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return uvicorn.Config(
        app,
        loop="none",
        http="h11",  # of no effect: an Acceptor makes the connections
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=guards.idle_timeout_s,  # type: ignore[arg-type]  # whole seconds by its type alone
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        **tls,
    )


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    # With the protocol named: asyncio sends small pieces at once only where it can tell that it is TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        send_little_ahead(listening)
        listening.bind((host.strip("[]"), int(port)))
        listening.listen(BACKLOG)  # from now on a caller waits and is not refused
    except (OSError, OverflowError) as error:
        listening.close()
        why = why_not_free(address) or str(error)
        raise ConfigError(f"{address} cannot be listened on: {why}; choose another with --http") from None
    listening.setblocking(False)
    return listening
