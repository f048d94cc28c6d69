"""Requests under way, whichever front they came through: each is admitted, read, planned and sent on its route."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import bagel
from bagel.errors import Busy, InvalidRequest
from bagel.pipelines import PipelineConfig
from bagel.request import MAX_SEED
from bagel.rpc.admission import Admission
from bagel.rpc.unread import Unread
from bagel.telemetry.logs import Log
from bagel.v1 import gateway_pb2
from bagel_gateway.backends import Backends, Services
from bagel_gateway.images import InputImages
from bagel_gateway.metrics import Metrics
from bagel_gateway.outbox import delivered
from bagel_gateway.planning import Asked, plan, read_request
from bagel_gateway.routes import route_of
from bagel_gateway.routes.base import Event, Put, Remaining

PutOne = Callable[[tuple[int, Event]], None]
"""Takes an event of one of several results."""

log = Log("bagel_gateway.serving")


class Requests:
    """Serves requests. deployed: the pipeline of requests that do not say whether to think."""

    def __init__(
        self,
        deployed: PipelineConfig,
        backends: Backends,
        admission: Admission,
        defaults: Mapping[str, Any],
        metrics: Metrics,
        unread: Unread,
        images: InputImages,
        *,
        log_stats: bool = False,
    ) -> None:
        """unread: what the gateway holds for clients that read slowly; log_stats: log each request's time by stage."""
        self._deployed, self._backends, self._admission, self._defaults = deployed, backends, admission, defaults
        self._metrics, self._unread, self.images, self._log_stats = metrics, unread, images, log_stats

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The deployment's settings for what a request leaves open."""
        return {"think": bool(self._deployed.thinks), **self._defaults}

    async def serve(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> AsyncGenerator[Event, None]:
        """What happens to one request, `accepted` first and `finished` last; raises the BagelError that it ends with.

        remaining: seconds until the caller's deadline. Closing the generator cancels the request in every stage. The
        work does not wait for the reader of these events, and gives its place back when it is done.
        """
        if message.check_only:
            yield Event(accepted=await self._check(message, remaining))
            return

        async def work(put: Put) -> None:
            with self._metrics.request(message.request.modality) as seen:
                async with self._admission.admit() as waited_s:
                    await self._run(await self._read(message), None, remaining, waited_s, _both(seen, put))

        async with aclosing(delivered(work, _joined, _size, self._unread)) as events:
            async for event in events:
                yield event

    async def serve_many(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """As `serve`, for several results of one prompt with rising seeds: (which, event).

        Their images are read once, and all go to one Thinker, which computes their prompt once. Each takes a place of
        its own and gives it back when it is done. Once the first is accepted all are: the others wait for their places.
        """
        if count == 1:
            async with aclosing(self.serve(message, remaining)) as events:
                async for event in events:
                    yield 0, event
            return

        async def work(put: PutOne) -> None:
            await self._run_all(message, count, remaining, put)

        async with aclosing(delivered(work, _joined_of_many, _size_of_one, self._unread)) as many:
            async for item in many:
                yield item

    async def describe(self) -> gateway_pb2.DescribeModelResponse:
        """What is served; NoBackend while nothing is."""
        services = await self._backends.begin(self._deployed.stages)
        return gateway_pb2.DescribeModelResponse(
            model=services.model, pipeline=self._deployed.model_type, version=bagel.__version__
        )

    async def _read(self, message: gateway_pb2.GenerateRequest) -> Asked:
        return await read_request(message, self._deployed, self._defaults, self.images)

    async def _check(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> gateway_pb2.Accepted:
        """What a request that can be served would be accepted as; nothing is computed for it."""
        async with self._admission.admit():
            asked = await self._read(message)
            services = await self._backends.begin(asked.path)
            planned = plan(asked, services.model)
            route = route_of(planned)(planned, services, remaining)
            await route.check()
            return route.accepted

    async def _run(
        self,
        asked: Asked,
        services: Services | None,
        remaining: Remaining,
        waited_s: float,
        put: Put,
        *,
        begun: bool = False,
    ) -> None:
        """One request that has its place, for which it waited so long. begun: as a `Route` takes it."""
        began = time.perf_counter()
        services = services or await self._backends.begin(asked.path)
        planned = plan(asked, services.model)
        with services.busy():
            thinker = services.thinker
            log.info(
                "accepted", pipeline=planned.pipeline.model_type, thinker=thinker.name if thinker is not None else None
            )
            firsts: dict[str, float] = {}

            def tell(event: Event) -> None:
                firsts.setdefault(event.WhichOneof("event") or "", time.perf_counter() - began)
                if self._log_stats and event.HasField("finished"):
                    log.info("stats", **_stats(event.finished, firsts))
                put(event)

            route = route_of(planned)(planned, services, remaining, tell, waited_s=waited_s, begun=begun)
            await route.run()
            log.info("finished", seconds=round(time.perf_counter() - began, 4))

    async def _run_all(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining, put: PutOne
    ) -> None:
        """The first result, and all others once it is accepted. Ends with the first error, the others cancelled."""
        try:
            async with asyncio.TaskGroup() as group, self._admission.admit() as waited_s:
                asked = await self._read(message)
                services = await self._backends.begin(asked.path)
                first, *others = _copies(asked, count)

                def tell(event: Event) -> None:
                    put((0, event))
                    if event.HasField("accepted"):
                        for number, copy in enumerate(others, 1):
                            group.create_task(self._run_later(number, copy, services, remaining, put))

                with self._metrics.request_of(first.request.modality) as seen:
                    await self._run(first, services, remaining, waited_s, _both(seen, tell))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _run_later(
        self, number: int, asked: Asked, services: Services, remaining: Remaining, put: PutOne
    ) -> None:
        """One more result of a call that was accepted. If its K/V find no room it gives all back and tries again."""
        told: set[str] = set()

        def tell(event: Event) -> None:
            kind = event.WhichOneof("event") or ""
            if kind not in ("accepted", "prefill") or kind not in told:  # which come again with each try
                told.add(kind)
                put((number, event))

        while True:
            try:
                async with self._admission.admit(begun=True) as waited_s:
                    with self._metrics.request_of(asked.request.modality) as seen:
                        await self._run(asked, services, remaining, waited_s, _both(seen, tell), begun=True)
                return
            except Busy as busy:
                if told & {"text", "drawing", "step"}:
                    raise
                log.info("too busy for one more result; it is tried again", number=number, why=str(busy))
                await asyncio.sleep(busy.retry_after_s)


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


def _both(seen: Put, put: Put) -> Put:
    def tell(event: Event) -> None:
        seen(event)
        put(event)

    return tell


def _joined(one: Event, other: Event) -> Event | None:
    """Pieces of text that wait to be sent, as one; None for other events."""
    if not (one.HasField("text") and other.HasField("text")):
        return None
    if one.text.think != other.text.think:
        return None
    one.text.text += other.text.text
    return one


def _joined_of_many(one: tuple[int, Event], other: tuple[int, Event]) -> tuple[int, Event] | None:
    both = _joined(one[1], other[1]) if one[0] == other[0] else None
    return None if both is None else (one[0], both)


def _size(event: Event) -> int:
    return event.ByteSize()


def _size_of_one(item: tuple[int, Event]) -> int:
    return item[1].ByteSize()
