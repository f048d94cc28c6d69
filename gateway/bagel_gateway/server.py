"""The gateway's service: it checks requests, sends them through the pipeline and passes events back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, nullcontext
from typing import Any, TypeVar

import bagel
from bagel.errors import NoBackend
from bagel.pipelines import BAGEL_SINGLE_STAGE, PipelineConfig
from bagel.status import streaming, unary
from bagel.telemetry import Log, current_request
from bagel.transport import Host
from bagel.v1 import gateway_pb2, gateway_pb2_grpc
from bagel.v1.common_pb2 import ModelInfo
from bagel_gateway.admission import Admission
from bagel_gateway.backends import Backends, DitBackend, ThinkerBackend
from bagel_gateway.planning import Asked, plan, read_request
from bagel_gateway.routing import Route
from bagel_gateway.settings import Settings

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

LOOK_AGAIN_S = 0.05

T = TypeVar("T")

log = Log("bagel_gateway.server")


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """GatewayService of bagel.v1. deployed: the pipeline of requests that do not say whether to think."""

    def __init__(
        self,
        deployed: PipelineConfig,
        backends: Backends,
        admission: Admission,
        defaults: Mapping[str, Any],
        wait_s: float,
    ) -> None:
        """wait_s: how long a request waits for a backend to be ready, as one that is started again soon is."""
        self._deployed, self._backends = deployed, backends
        self._admission, self._defaults, self._wait_s = admission, defaults, wait_s

    @streaming
    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Serve one request."""
        async with self._admission.admit():
            events = self._serve(
                await read_request(request.request, request.output_format, self._deployed, self._defaults), context
            )
            async with aclosing(events):
                async for event in events:
                    yield event

    @unary
    async def DescribeModel(
        self, request: gateway_pb2.DescribeModelRequest, context: Any
    ) -> gateway_pb2.DescribeModelResponse:
        """Say what is served; NoBackend while nothing is."""
        _, model = await self._in_time(lambda: self._choose(makes_image=True))
        return gateway_pb2.DescribeModelResponse(
            model=model, pipeline=self._deployed.model_type, version=bagel.__version__
        )

    async def _serve(self, asked: Asked, context: Any) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        began = time.perf_counter()
        makes_image = asked.request.modality.makes_image
        thinker, model = await self._in_time(lambda: self._choose(makes_image))
        planned = plan(asked, model)
        del asked  # its images are decoded, and large
        with thinker.busy() if thinker is not None else nullcontext():
            accepted = gateway_pb2.Accepted(
                request_id=current_request.get(),
                seed=planned.resolved.seed,
                pipeline=planned.pipeline.model_type,
                resolved=planned.resolved,
            )
            log.info("accepted", pipeline=accepted.pipeline, thinker=thinker.name if thinker is not None else None)
            yield gateway_pb2.GenerateResponse(accepted=accepted)

            async def choose_dit() -> DitBackend:
                return await self._in_time(lambda: self._backends.dit_for(thinker, model))

            events = Route(planned, thinker, choose_dit, context.time_remaining).events()
            async with aclosing(events):
                async for event in events:
                    yield event
            log.info("finished", seconds=round(time.perf_counter() - began, 4))

    async def _in_time(self, choose: Callable[[], T]) -> T:
        """What is chosen; NoBackend if what it is chosen from is not ready in time."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return choose()
            except NoBackend:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    def _choose(self, makes_image: bool) -> tuple[ThinkerBackend | None, ModelInfo]:
        """The Thinker that a request goes to, and the model that it is planned for.

        The DiT is chosen when its turn comes: while a think text is written, another one may have gone.
        """
        thinker: ThinkerBackend | None = None
        if self._deployed is BAGEL_SINGLE_STAGE:
            model = self._backends.dit().model
        else:
            thinker = self._backends.pair()[0] if makes_image else self._backends.thinker()
            model = thinker.model
        assert model is not None
        return thinker, model


class Gateway:
    """A gateway that listens, watches its backends, and is ready while each stage has one. Ends with `close`."""

    def __init__(self, settings: Settings) -> None:
        self.host = Host(settings.listen, (SERVICE,), settings.front_security)
        self.backends = Backends(
            settings.thinkers,
            settings.dits,
            single_stage=settings.pipeline is BAGEL_SINGLE_STAGE,
            security=settings.security,
            check_every_s=settings.check_every_s,
            silence_s=settings.silence_timeout_s,
        )
        self.admission = Admission(settings.max_requests, settings.batch_timeout_s, self.host.draining)
        service = GatewayService(
            settings.pipeline, self.backends, self.admission, settings.sampling_defaults, settings.backend_timeout_s
        )
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, self.host.methods)
        self._drain_s = settings.drain_timeout_s
        self.was_ready = asyncio.Event()
        """Set once every stage had a service that is ready."""

    async def start(self) -> None:
        """Listen, and watch the backends."""
        await self.host.start()
        self.backends.start(self._on_ready)

    async def until_stopped(self) -> None:
        """Serve until SIGTERM, then drain and close."""
        await self.host.until_stopped(self._drain_s)
        await self.backends.close()

    async def close(self, drain_s: float | None = None) -> None:
        """Drain and close."""
        await self.host.drain(self._drain_s if drain_s is None else drain_s)
        await self.backends.close()

    async def _on_ready(self, ready: bool) -> None:
        await (self.host.ready() if ready else self.host.not_ready())
        if ready:
            self.was_ready.set()
