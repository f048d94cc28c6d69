"""The gateway: its gRPC service, its REST front if it has one, and what both share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from bagel.deployment import serving
from bagel.deployment.defaults import missing_install_named
from bagel.deployment.gateway_config import GatewayConfig
from bagel.pipelines import pipeline
from bagel.rpc.deadlines import deadline_of
from bagel.rpc.errors import streaming, unary
from bagel.rpc.transport import Host
from bagel.rpc.unread import Unread
from bagel.v1 import gateway_pb2, gateway_pb2_grpc
from bagel_gateway.backend import Address
from bagel_gateway.backends import CHECK_EVERY_S, Backends
from bagel_gateway.images import InputImages
from bagel_gateway.keys import KeyInterceptor, Keys
from bagel_gateway.metrics import Metrics
from bagel_gateway.places import Places
from bagel_gateway.receiving import Receiving
from bagel_gateway.room import Room
from bagel_gateway.serving import Requests
from bagel_gateway.settings import Tls, tls_of

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """GatewayService of bagel.v1."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    @streaming
    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Serve one request."""

        def remaining() -> float | None:
            # gRPC cannot pass on a deadline in thousands of years, as some clients set it.
            return deadline_of(context.time_remaining())

        async with aclosing(self._requests.serve(request, remaining)) as events:
            async for event in events:
                yield event

    @unary
    async def DescribeModel(
        self, request: gateway_pb2.DescribeModelRequest, context: Any
    ) -> gateway_pb2.DescribeModelResponse:
        """Say what is served; NoBackend while nothing is."""
        return await self._requests.describe()


class Gateway:
    """A gateway that listens, watches its backends, and is ready while each stage has one. Ends with `close`."""

    def __init__(self, config: GatewayConfig, *, check_every_s: float = CHECK_EVERY_S) -> None:
        self.tls = tls = tls_of(config)
        keys = None if config.api_keys is None else Keys(config.api_keys)
        guards = () if keys is None else (KeyInterceptor(keys),)
        limits = serving.limits(config)
        unread = Unread(config.reader_timeout_s, config.max_unread_bytes, config.max_unread_bytes_per_call)
        self.room = Room(config.max_bytes_in_flight)
        receive = Receiving(self.room, limits.message_s).message
        self.host = Host(config.listen, (SERVICE,), tls.front, guards, unread, limits, receive)
        self.backends = _backends(config, tls, check_every_s)
        self.admission = Places(config, pipeline(config.pipeline), self.backends, self.host.draining)
        self.metrics = Metrics()
        self.metrics.watch(self.admission, self.backends)
        pool = serving.image_pool(config, config.batch_timeout_s)
        self.images = InputImages(pool, config.max_images, config.max_image_pixels)
        self.requests = Requests(
            pipeline(config.pipeline),
            self.backends,
            self.admission,
            config.sampling_defaults,
            self.metrics,
            self.host.unread,
            self.images,
            picture_settings=config.picture_settings,
            log_stats=config.log_stats,
        )
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(GatewayService(self.requests), self.host.methods)
        self._drain_s, self._keys = config.drain_timeout_s, keys
        self._watching: asyncio.Task[None] | None = None
        self.was_ready = asyncio.Event()
        """Set once every stage had a service that is ready."""
        self.rest = None
        if config.http is not None:
            # Imported here alone: a gateway without HTTP loads no web framework.
            with missing_install_named("gateway", "--http needs more than is installed"):
                from bagel_gateway.rest.server import RestServer

            draining, port = self.host.draining.is_set, self.host.port
            self.rest = RestServer(
                config,
                tls.front,
                self.requests,
                self.metrics,
                self.backends,
                draining,
                keys,
                port,
                self.host.unread,
                self.room,
            )

    async def start(self) -> None:
        """Listen, and watch the backends and the API keys."""
        if self._keys is not None:
            self._watching = asyncio.create_task(self._keys.watch(), name="watch API keys")
        await self.host.start()
        if self.rest is not None:
            await self.rest.start()
        # Last, so that both fronts listen by the time the gateway is ready.
        self.backends.start(self._on_ready, self.admission.refill)

    async def until_stopped(self) -> None:
        """Serve until SIGTERM, then drain and close."""
        await self.host.until_stopped(self._drain_s, self._idle)
        await self._close()

    async def close(self, drain_s: float | None = None) -> None:
        """Drain and close."""
        await self.host.drain(self._drain_s if drain_s is None else drain_s, self._idle)
        await self._close()

    def _idle(self) -> bool:
        """Whether nothing is under way, on either front."""
        return not self.admission.under_way and (self.rest is None or not self.rest.answering)

    async def _close(self) -> None:
        if self.rest is not None:
            # The front first, since its requests use what is closed after it.
            await self.rest.stop()
        if self._watching is not None:
            self._watching.cancel()
        await self.images.close()
        await self.backends.close()

    async def _on_ready(self, ready: bool) -> None:
        await (self.host.ready() if ready else self.host.not_ready())
        if ready:
            self.was_ready.set()


def _backends(config: GatewayConfig, tls: Tls, check_every_s: float) -> Backends:
    return Backends(
        pipeline(config.pipeline),
        [Address.parse(service) for service in config.thinkers],
        [Address.parse(service) for service in config.dits],
        security=tls.inner,
        check_every_s=check_every_s,
        silence_s=config.silence_timeout_s,
        wait_s=config.backend_timeout_s,
        server_names=tls.server_names,
    )
