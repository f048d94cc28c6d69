"""The gateway's service: it checks requests, sends them through the pipeline and passes events back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing
from typing import Any

import bagel
from bagel.errors import NoBackend
from bagel.pipelines import BAGEL_SINGLE_STAGE, PipelineConfig
from bagel.status import streaming, unary
from bagel.telemetry import Log, current_request
from bagel.transport import Host
from bagel.v1 import gateway_pb2, gateway_pb2_grpc
from bagel_gateway.admission import Admission
from bagel_gateway.backends import Backends, DitBackend, ThinkerBackend
from bagel_gateway.planning import Asked, plan, read_request
from bagel_gateway.routing import Route
from bagel_gateway.settings import Settings

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

LOOK_AGAIN_S = 0.05

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
        thinker, dit = await self._ready(makes_image=True)
        model = thinker.model if thinker is not None else dit.model if dit is not None else None
        return gateway_pb2.DescribeModelResponse(
            model=model, pipeline=self._deployed.model_type, version=bagel.__version__
        )

    async def _serve(self, asked: Asked, context: Any) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        began = time.perf_counter()
        thinker, dit = await self._ready(asked.request.modality.makes_image)
        model = next(backend.model for backend in (thinker, dit) if backend is not None)
        assert model is not None
        planned = plan(asked, model)
        del asked  # its images are decoded, and large
        with ExitStack() as counted:
            for backend in (thinker, dit):
                if backend is not None:
                    counted.enter_context(backend.busy())
            accepted = gateway_pb2.Accepted(
                request_id=current_request.get(),
                seed=planned.resolved.seed,
                pipeline=planned.pipeline.model_type,
                resolved=planned.resolved,
            )
            log.info("accepted", pipeline=accepted.pipeline, backends=_names(thinker, dit))
            yield gateway_pb2.GenerateResponse(accepted=accepted)
            events = Route(planned, thinker, dit, context.time_remaining).events()
            async with aclosing(events):
                async for event in events:
                    yield event
            log.info("finished", seconds=round(time.perf_counter() - began, 4))

    async def _ready(self, makes_image: bool) -> tuple[ThinkerBackend | None, DitBackend | None]:
        """The services that a request goes through; NoBackend if they are not ready in time."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return self._choose(makes_image)
            except NoBackend:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    def _choose(self, makes_image: bool) -> tuple[ThinkerBackend | None, DitBackend | None]:
        """The services that a request goes through."""
        if self._deployed is BAGEL_SINGLE_STAGE:
            return None, self._backends.dit()
        if not makes_image:
            return self._backends.thinker(), None
        return self._backends.pair()


class Gateway:
    """A gateway that listens, watches its backends, and is ready while each stage has one. Ends with `close`."""

    def __init__(self, settings: Settings) -> None:
        self.host = Host(settings.listen, (SERVICE,), settings.security)
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


def _names(*backends: ThinkerBackend | DitBackend | None) -> list[str]:
    return [backend.name for backend in backends if backend is not None]
