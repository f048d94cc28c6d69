"""Requests on their way, whichever front they came through: admitted, read, planned, sent through the stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import bagel
from bagel.errors import InvalidRequest, NoBackend
from bagel.pipelines import BAGEL_SINGLE_STAGE, PipelineConfig
from bagel.request import MAX_SEED
from bagel.telemetry import Log, current_request
from bagel.together import Together
from bagel.v1 import gateway_pb2
from bagel.v1.common_pb2 import ModelInfo
from bagel_gateway.admission import Admission
from bagel_gateway.backends import Backends, DitBackend, ThinkerBackend
from bagel_gateway.metrics import Metrics
from bagel_gateway.planning import Asked, plan, read_request
from bagel_gateway.routing import Remaining, Route

LOOK_AGAIN_S = 0.05

T = TypeVar("T")
Event = gateway_pb2.GenerateResponse
Begin = tuple[ThinkerBackend | None, ModelInfo]
"""The Thinker that a request goes to, and the model that it is planned for."""

log = Log("bagel_gateway.serving")


class Requests:
    """Serves requests. deployed: the pipeline of those that do not say whether to think."""

    def __init__(
        self,
        deployed: PipelineConfig,
        backends: Backends,
        admission: Admission,
        defaults: Mapping[str, Any],
        wait_s: float,
        metrics: Metrics,
        *,
        log_stats: bool = False,
    ) -> None:
        """wait_s: how long a request waits for a backend to be ready, as one that is started again soon is.

        log_stats: log where the time of each request went.
        """
        self._deployed, self._backends = deployed, backends
        self._admission, self._defaults, self._wait_s, self._metrics = admission, defaults, wait_s, metrics
        self._log_stats = log_stats

    @property
    def thinks(self) -> bool:
        """Whether requests think that do not say."""
        return bool(self._defaults.get("think") or self._deployed.thinks)

    async def serve(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> AsyncGenerator[Event, None]:
        """What happens to one request, `accepted` first and `finished` last; raises the BagelError that it ends with.

        remaining: seconds until the caller's deadline. Closing the generator cancels the request in every stage.
        """
        with self._metrics.request(message.request.modality) as seen:
            async with self._admission.admit() as waited_s:
                asked = await self._read(message)
                async with aclosing(self._run(asked, remaining, waited_s)) as events:
                    del asked  # its images are decoded, and large
                    async for event in events:
                        seen(event)
                        yield event

    async def serve_many(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """As `serve`, for so many of one prompt: (which, event), with rising seeds.

        Its images are read once, and all go to one Thinker, which computes their prompt once. Each takes a place of
        its own; what the services are too busy for waits while others of them run.
        """
        if count == 1:
            async with aclosing(self.serve(message, remaining)) as events:
                async for event in events:
                    yield 0, event
            return
        async with AsyncExitStack() as stack:
            waited_s = await stack.enter_async_context(self._admission.admit())
            asked = await self._read(message)
            begin = await self._begin(asked)
            copies = _copies(asked, count)
            queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
            work = asyncio.create_task(self._run_all(copies, begin, remaining, waited_s, queue))
            stack.push_async_callback(_end, work)
            while (item := await queue.get()) is not None:
                yield item
            await work

    async def describe(self) -> gateway_pb2.DescribeModelResponse:
        """What is served; NoBackend while nothing is."""
        _, model = await self._in_time(lambda: self._choose(makes_image=True))
        return gateway_pb2.DescribeModelResponse(
            model=model, pipeline=self._deployed.model_type, version=bagel.__version__
        )

    async def _read(self, message: gateway_pb2.GenerateRequest) -> Asked:
        return await read_request(message, self._deployed, self._defaults)

    async def _run_all(
        self,
        copies: list[Asked],
        begin: Begin,
        remaining: Remaining,
        first_waited_s: float,
        queue: asyncio.Queue[tuple[int, Event] | None],
    ) -> None:
        """All copies at once; the first has its place already. Ends with the first error, the others cancelled."""
        together = Together()

        async def run(number: int, asked: Asked) -> None:
            refused = True
            while refused:
                with together.attempt() as attempt:
                    place: AbstractAsyncContextManager[float] = nullcontext(first_waited_s)
                    if number:
                        place = self._admission.admit()
                    async with place as waited_s:
                        with self._metrics.request_of(asked.request.modality) as seen:
                            async with aclosing(self._run(asked, remaining, waited_s, begin)) as events:
                                async for event in events:
                                    seen(event)
                                    attempt.begun |= event.WhichOneof("event") in ("text", "drawing", "step")
                                    queue.put_nowait((number, event))
                refused = attempt.refused is not None
                if attempt.refused is not None:
                    await asyncio.sleep(attempt.refused.retry_after_s)

        try:
            async with asyncio.TaskGroup() as group:
                for number, asked in enumerate(copies):
                    group.create_task(run(number, asked))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            queue.put_nowait(None)

    async def _run(
        self, asked: Asked, remaining: Remaining, waited_s: float, begin: Begin | None = None
    ) -> AsyncGenerator[Event, None]:
        """One request that has its place, for which it waited so long."""
        began = time.perf_counter()
        thinker, model = begin or await self._begin(asked)
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

            async def choose_dit() -> DitBackend:
                return await self._in_time(lambda: self._backends.dit_for(thinker, model))

            firsts: dict[str, float] = {}
            # Begun first: the stages need not wait until the client has been told.
            async with Route(planned, thinker, choose_dit, remaining, waited_s).events() as events:
                yield Event(accepted=accepted)
                async for event in events:
                    firsts.setdefault(event.WhichOneof("event") or "", time.perf_counter() - began)
                    if self._log_stats and event.HasField("finished"):
                        log.info("stats", **_stats(event.finished, firsts))
                    yield event
            log.info("finished", seconds=round(time.perf_counter() - began, 4))

    async def _begin(self, asked: Asked) -> Begin:
        makes_image = asked.request.modality.makes_image
        return await self._in_time(lambda: self._choose(makes_image))

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

    def _choose(self, makes_image: bool) -> Begin:
        """Where a request begins. The DiT is chosen when its turn comes: while a think text is written, another one
        may have gone.
        """
        thinker: ThinkerBackend | None = None
        if self._deployed is BAGEL_SINGLE_STAGE:
            model = self._backends.dit().model
        else:
            thinker = self._backends.pair()[0] if makes_image else self._backends.thinker()
            model = thinker.model
        assert model is not None
        return thinker, model


def _stats(finished: gateway_pb2.Finished, firsts: Mapping[str, float]) -> dict[str, object]:
    """Where the time of a request went, for its log line; firsts: seconds until the first event of each kind."""
    seconds = {timing.stage: timing.seconds for timing in finished.timings}
    seconds |= {f"first_{kind}": firsts[kind] for kind in ("text", "step") if kind in firsts}
    usage = {field.name: value for field, value in finished.usage.ListFields()}
    return {"seconds": {stage: round(each, 4) for stage, each in seconds.items()}, "usage": usage}


def _copies(asked: Asked, count: int) -> list[Asked]:
    """The same request with the seed, the seed + 1 and so on."""
    seed = asked.request.seed
    if seed + count - 1 > MAX_SEED:
        raise InvalidRequest("seed", f"seed is {seed}; for n = {count} it must be at most {MAX_SEED - count + 1}")
    return [replace(asked, request=replace(asked.request, seed=seed + number)) for number in range(count)]


async def _end(work: asyncio.Task[None]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
