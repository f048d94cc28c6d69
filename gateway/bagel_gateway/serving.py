"""Requests on their way, whichever front they came through: admitted, read, planned, sent through the stages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import bagel
from bagel.errors import Busy, InvalidRequest, NoBackend
from bagel.pipelines import BAGEL_SINGLE_STAGE, PipelineConfig
from bagel.request import MAX_SEED
from bagel.rpc.admission import Admission
from bagel.rpc.unread import Unread
from bagel.telemetry.logs import Log, current_request
from bagel.v1 import gateway_pb2
from bagel.v1.common_pb2 import ModelInfo
from bagel_gateway.backends import Backends, DitBackend, ThinkerBackend
from bagel_gateway.images import InputImages
from bagel_gateway.metrics import Metrics
from bagel_gateway.outbox import delivered
from bagel_gateway.planning import Asked, Plan, plan, read_request
from bagel_gateway.routing import Put, Remaining, Route, check_plan, joined

LOOK_AGAIN_S = 0.05

T = TypeVar("T")
Event = gateway_pb2.GenerateResponse
PutOne = Callable[[tuple[int, Event]], None]
"""What takes an event of one of several results."""
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
        unread: Unread,
        images: InputImages,
        *,
        log_stats: bool = False,
    ) -> None:
        """wait_s: how long a request waits for a backend to be ready, as one that is started again soon is.

        unread: what the gateway holds for clients that read slowly; log_stats: log where the time of each request went.
        """
        self._deployed, self._backends = deployed, backends
        self._admission, self._defaults, self._wait_s, self._metrics = admission, defaults, wait_s, metrics
        self._unread, self.images, self._log_stats = unread, images, log_stats

    @property
    def thinks(self) -> bool:
        """Whether requests think that do not say."""
        return bool(self._defaults.get("think") or self._deployed.thinks)

    async def serve(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> AsyncGenerator[Event, None]:
        """What happens to one request, `accepted` first and `finished` last; raises the BagelError that it ends with.

        remaining: seconds until the caller's deadline. Closing the generator cancels the request in every stage. The
        work does not wait for who reads this, and gives its place back when it is done.
        """
        if message.check_only:
            yield Event(accepted=await self._check(message, remaining))
            return

        async def work(put: Put) -> None:
            with self._metrics.request(message.request.modality) as seen:
                async with self._admission.admit() as waited_s:
                    await self._run(await self._read(message), remaining, waited_s, _both(seen, put))

        async with aclosing(delivered(work, joined, _size, self._unread)) as events:
            async for event in events:
                yield event

    async def serve_many(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """As `serve`, for so many of one prompt: (which, event), with rising seeds.

        Its images are read once, and all go to one Thinker, which computes their prompt once. Each takes a place of
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
        _, model = await self._in_time(lambda: self._choose(makes_image=True))
        return gateway_pb2.DescribeModelResponse(
            model=model, pipeline=self._deployed.model_type, version=bagel.__version__
        )

    async def _check(self, message: gateway_pb2.GenerateRequest, remaining: Remaining) -> gateway_pb2.Accepted:
        """What a request that can be served would be accepted as; nothing is computed for it."""
        async with self._admission.admit():
            asked = await self._read(message)
            thinker, model = await self._begin(asked)
            planned = plan(asked, model)

            async def choose_dit() -> DitBackend:
                return await self._in_time(lambda: self._backends.dit_for(thinker, model))

            await check_plan(planned, thinker, choose_dit, remaining)
            return _accepted(planned)

    async def _read(self, message: gateway_pb2.GenerateRequest) -> Asked:
        return await read_request(message, self._deployed, self._defaults, self.images)

    async def _run_all(
        self, message: gateway_pb2.GenerateRequest, count: int, remaining: Remaining, put: PutOne
    ) -> None:
        """The first result, and all others once it is accepted. Ends with the first error, the others cancelled."""
        try:
            async with asyncio.TaskGroup() as group, self._admission.admit() as waited_s:
                asked = await self._read(message)
                begin = await self._begin(asked)
                first, *others = _copies(asked, count)

                def tell(event: Event) -> None:
                    put((0, event))
                    if event.HasField("accepted"):
                        for number, copy in enumerate(others, 1):
                            group.create_task(self._run_later(number, copy, remaining, begin, put))

                with self._metrics.request_of(first.request.modality) as seen:
                    await self._run(first, remaining, waited_s, _both(seen, tell), begin)
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _run_later(self, number: int, asked: Asked, remaining: Remaining, begin: Begin, put: PutOne) -> None:
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
                        await self._run(asked, remaining, waited_s, _both(seen, tell), begin, begun=True)
                return
            except Busy as busy:
                if told & {"text", "drawing", "step"}:
                    raise
                log.info("too busy for one more result; it is tried again", number=number, why=str(busy))
                await asyncio.sleep(busy.retry_after_s)

    async def _run(
        self,
        asked: Asked,
        remaining: Remaining,
        waited_s: float,
        put: Put,
        begin: Begin | None = None,
        *,
        begun: bool = False,
    ) -> None:
        """One request that has its place, for which it waited so long. begun: as a `Route` takes it."""
        began = time.perf_counter()
        thinker, model = begin or await self._begin(asked)
        planned = plan(asked, model)
        del asked  # its images may be large
        with thinker.busy() if thinker is not None else nullcontext():
            accepted = _accepted(planned)
            log.info("accepted", pipeline=accepted.pipeline, thinker=thinker.name if thinker is not None else None)

            async def choose_dit() -> DitBackend:
                return await self._in_time(lambda: self._backends.dit_for(thinker, model))

            firsts: dict[str, float] = {}

            def tell(event: Event) -> None:
                firsts.setdefault(event.WhichOneof("event") or "", time.perf_counter() - began)
                if self._log_stats and event.HasField("finished"):
                    log.info("stats", **_stats(event.finished, firsts))
                put(event)

            await Route(planned, thinker, choose_dit, remaining, tell, accepted, waited_s, begun=begun).run()
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


def _accepted(planned: Plan) -> gateway_pb2.Accepted:
    return gateway_pb2.Accepted(
        request_id=current_request.get(),
        seed=planned.resolved.seed,
        pipeline=planned.pipeline.model_type,
        resolved=planned.resolved,
    )


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


def _joined_of_many(one: tuple[int, Event], other: tuple[int, Event]) -> tuple[int, Event] | None:
    both = joined(one[1], other[1]) if one[0] == other[0] else None
    return None if both is None else (one[0], both)


def _size(event: Event) -> int:
    return event.ByteSize()


def _size_of_one(item: tuple[int, Event]) -> int:
    return item[1].ByteSize()
