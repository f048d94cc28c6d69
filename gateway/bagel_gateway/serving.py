"""Requests under way, whichever front they came through: each is admitted, read, planned and sent on its route."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import bagel
from bagel.errors import Busy, InvalidRequest
from bagel.pipelines import PipelineConfig
from bagel.request import MAX_SEED, Modality
from bagel.rpc import convert
from bagel.rpc.integrity import WIRE_VERSION
from bagel.rpc.unread import Unread
from bagel.telemetry.logs import Log
from bagel.v1 import gateway_pb2
from bagel_gateway.backends import Backends, Services
from bagel_gateway.embedding import embedding
from bagel_gateway.images import InputImages
from bagel_gateway.metrics import Metrics
from bagel_gateway.outbox import delivered
from bagel_gateway.places import Places
from bagel_gateway.planning import Asked, plan, read_request
from bagel_gateway.routes import route_of
from bagel_gateway.routes.base import Event, Put, Remaining

Numbered = tuple[int, Event]
"""An event of one of several results, and which result it is of."""
PutNumbered = Callable[[Numbered], None]

log = Log("bagel_gateway.serving")


class Requests:
    """Serves requests. deployed: the pipeline of requests that do not say whether to think."""

    def __init__(
        self,
        deployed: PipelineConfig,
        backends: Backends,
        places: Places,
        defaults: Mapping[str, Any],
        metrics: Metrics,
        unread: Unread,
        images: InputImages,
        *,
        picture_settings: str = "full",
        log_stats: bool = False,
    ) -> None:
        """unread: what the gateway holds for clients that read slowly; log_stats: log each request's time by stage.

        picture_settings: what is put into pictures' files, see `bagel_gateway.embedding`.
        """
        self._deployed, self._backends, self._places, self._defaults = deployed, backends, places, defaults
        self._metrics, self._unread, self.images, self._log_stats = metrics, unread, images, log_stats
        self._picture_settings = picture_settings

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The deployment's settings for what a request leaves open."""
        return {"think": bool(self._deployed.thinks), **self._defaults}

    async def serve(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> AsyncGenerator[Event, None]:
        """What happens to one request, `accepted` first and `finished` last; raises the BagelError that it ends with.

        remaining: seconds until the caller's deadline. Closing the generator cancels the request in every stage.
        """
        if message.check_only:
            yield Event(accepted=await self._check(message, remaining))
            return
        async with aclosing(self.serve_many(message, 1, remaining)) as events:
            async for _, event in events:
                yield event

    async def serve_many(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining
    ) -> AsyncGenerator[Numbered, None]:
        """As `serve`, for several results of one prompt with rising seeds: (which, event).

        Their images are read once, and all go to one Thinker, which computes their prompt once. Each takes a place of
        its own. Once the first is accepted all are: the others wait for their places. The work does not wait for the
        reader of these events, and gives its places back when it is done.
        """

        async def work(put: PutNumbered) -> None:
            await self._run_all(message, count, remaining, put)

        async with aclosing(delivered(work, _joined, _size, self._unread)) as events:
            async for event in events:
                yield event

    async def describe(self) -> gateway_pb2.DescribeModelResponse:
        """What is served; NoBackend while nothing is."""
        services = await self._backends.begin(self._deployed.stages)
        return gateway_pb2.DescribeModelResponse(
            model=services.model,
            pipeline=self._deployed.model_type,
            version=bagel.__version__,
            wire_version=WIRE_VERSION,
        )

    async def _run_all(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining, put: PutNumbered
    ) -> None:
        """The first result, and all others once it is accepted. Ends with the first error, the others cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                # Around the admission, so that a request that finds no place is counted too.
                modality = _modality(message)
                with self._metrics.request(str(modality or "none")) as seen:
                    async with self._places.admit(modality) as waited_s:
                        asked = await self._read(message)
                        services = await self._backends.begin(asked.path)
                        first, *others = _copies(asked, count)

                        def emit(event: Event) -> None:
                            seen(event)
                            put((0, event))
                            if event.HasField("accepted"):
                                for number, copy in enumerate(others, 1):
                                    group.create_task(self._run_later(number, copy, services, remaining, put))

                        await self._run(first, services, remaining, waited_s, emit)
        except BaseExceptionGroup as failed:
            # The first error is the cause; the other results were cancelled for it.
            raise failed.exceptions[0] from None

    async def _run(
        self, asked: Asked, services: Services, remaining: Remaining, waited_s: float, put: Put, *, begun: bool = False
    ) -> None:
        """One request that has its place, for which it waited so long. begun: as a `Route` takes it."""
        began, firsts = time.perf_counter(), dict[str, float]()
        planned = plan(asked, services.model)
        put_settings = embedding(planned, self._picture_settings)

        def emit(event: Event) -> None:
            put_settings(event)
            firsts.setdefault(event.WhichOneof("event") or "", time.perf_counter() - began)
            if self._log_stats and event.HasField("finished"):
                log.info("stats", **_stats(event.finished, firsts))
            put(event)

        with services.busy():
            thinker = None if services.thinker is None else services.thinker.name
            log.info("accepted", pipeline=planned.pipeline.model_type, thinker=thinker)
            await route_of(planned)(planned, services, remaining, emit, waited_s=waited_s, begun=begun).run()
            log.info("finished", seconds=round(time.perf_counter() - began, 4))

    async def _run_later(
        self, number: int, asked: Asked, services: Services, remaining: Remaining, put: PutNumbered
    ) -> None:
        """One more result of a call that was accepted. If its K/V find no room it gives all back and tries again."""
        emitted: set[str] = set()

        def emit(seen: Put, event: Event) -> None:
            seen(event)
            kind = event.WhichOneof("event") or ""
            if kind not in ("accepted", "prefill") or kind not in emitted:  # which come again with each try
                emitted.add(kind)
                put((number, event))

        while True:
            try:
                async with self._places.admit(asked.request.modality, begun=True) as waited_s:
                    with self._metrics.request(str(asked.request.modality)) as seen:
                        await self._run(asked, services, remaining, waited_s, partial(emit, seen), begun=True)
                return
            except Busy as busy:
                # What its client has seen cannot be taken back.
                if emitted & {"text", "drawing", "step"}:
                    raise
                log.info("too busy for one more result; it is tried again", number=number, why=str(busy))
                # Slept outside of its place, which others may have meanwhile.
                await asyncio.sleep(busy.retry_after_s)

    async def _check(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> gateway_pb2.Accepted:
        """What a request that can be served would be accepted as; nothing is computed for it."""
        async with self._places.admit(_modality(message)):
            asked = await self._read(message)
            services = await self._backends.begin(asked.path)
            planned = plan(asked, services.model)
            route = route_of(planned)(planned, services, remaining)
            await route.check()
            return route.accepted

    async def _read(self, message: gateway_pb2.GenerateRequest) -> Asked:
        return await read_request(message, self._deployed, self._defaults, self.images)


def _modality(message: gateway_pb2.GenerateRequest) -> Modality | None:
    """The modality by which a request is counted; None for one that is refused for it."""
    try:
        return convert.modality_from_wire(message.request.modality)
    except InvalidRequest:
        return None


def _stats(finished: gateway_pb2.Finished, firsts: Mapping[str, float]) -> dict[str, object]:
    """The seconds of a request by stage, for its log line; firsts: seconds until the first event of each kind."""
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


def _joined(one: Numbered, other: Numbered) -> Numbered | None:
    """Pieces of one text that wait to be sent, as one; None for other events."""
    (number, event), (same, more) = one, other
    if number != same or not (event.HasField("text") and more.HasField("text")) or event.text.think != more.text.think:
        return None
    event.text.text += more.text.text
    event.text.tokens = more.text.tokens
    return number, event


def _size(numbered: Numbered) -> int:
    return numbered[1].ByteSize()
