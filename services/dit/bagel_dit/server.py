"""DitService: takes work in, pulls what it lacks, lets the scheduler and the runner draw it."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from grpc.aio import ServicerContext

from bagel.checkpoint.limits import check_kv_room
from bagel.engine.commands import AddPicture, AddRequest, Begin, LoadPages
from bagel.engine.events import (
    Begun,
    Done,
    Drawn,
    Failed,
    Planned,
    Prefilled,
    Previewed,
    PromptRead,
    RequestEvent,
    StepTaken,
    Text,
    TextDone,
)
from bagel.errors import BagelError, Draining, InvalidRequest
from bagel.images.pool import ImagePool
from bagel.kv.codec import PAGE_VERSION
from bagel.kv.held import HeldContexts
from bagel.kv.puller import KvPuller
from bagel.prompts import BranchName
from bagel.request import Modality, Request
from bagel.rpc.admission import Admission
from bagel.rpc.convert import (
    branch_from_wire,
    modality_from_wire,
    output_from_wire,
    picture_format,
    request_from_wire,
    timings_to_wire,
)
from bagel.rpc.errors import streaming, unary
from bagel.rpc.integrity import WIRE_VERSION
from bagel.rpc.prompt_images import resized_images
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import watch_queue
from bagel.telemetry.stages import WINDOW, StageClock, stages_before
from bagel.telemetry.tracing import record
from bagel.v1 import common_pb2, dit_pb2, kv_pb2
from bagel.v1.dit_pb2_grpc import DitServiceServicer
from bagel_dit.page_loader import PageLoader
from bagel_dit.picture_request import add_picture, kv_tokens
from bagel_dit.runner_client import Events, RunnerClient
from bagel_dit.workers import HeldElsewhere

Response = dit_pb2.DitServiceGenerateResponse

log = Log("bagel.dit")


@dataclass
class _Work:
    """One call."""

    id: int
    events: Events = field(default_factory=asyncio.Queue)
    clock: StageClock = field(default_factory=StageClock)
    profile: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    text: TextDone | None = None

    def lap(self, stage: str, **attributes: int) -> float:
        """Count the time since the last lap to a stage, a span of the trace; its seconds."""
        began, ended = self.clock.lap(stage)
        record(stage, began, ended, **attributes)
        return ended - began

    async def next(self) -> RequestEvent:
        """The next event; raises the error that the work ended with."""
        event = await self.events.get()
        if isinstance(event, BagelError):
            raise event
        if isinstance(event, Failed):
            raise event.error
        return event


class DitServicer(DitServiceServicer):
    """Serves one runner. puller is None in single-stage mode, where no K/V is pulled and images reads images.

    draining: set once no new work may be begun.
    """

    def __init__(
        self,
        name: str,
        runner: RunnerClient,
        puller: KvPuller | None,
        images: ImagePool,
        *,
        sources: tuple[str, ...],
        max_num_seqs: int,
        batch_timeout_s: float,
        draining: asyncio.Event,
    ) -> None:
        self.name, self._runner, self.puller, self.sources, self._images = name, runner, puller, sources, images
        self._draining, self._under_way = draining, 0
        self._admission = Admission(name, max_num_seqs, batch_timeout_s)
        watch_queue(lambda: self._admission.waiting, lambda: self._admission.under_way)
        self._ids = itertools.count(1)

    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way

    @streaming
    async def Generate(
        self, request: dit_pb2.DitServiceGenerateRequest, context: ServicerContext[Any, Any]
    ) -> AsyncIterator[Response]:
        """Do one piece of work; a call that ends early stops it within a step."""
        if self._draining.is_set():
            raise Draining(f"{self.name} is shutting down and takes no new requests; try again, or another DiT")
        self._under_way += 1
        work = _Work(next(self._ids))
        try:
            self._runner.listen(work.id, work.events)
            async with AsyncExitStack() as stack:
                if request.WhichOneof("work") == "draw":
                    responses = self._draw(request, work, stack)
                else:
                    responses = self._serve(request, work, stack)
                async for response in responses:
                    yield response
        finally:
            self._runner.forget(work.id)
            self._under_way -= 1

    @unary
    async def Describe(
        self, request: dit_pb2.DitServiceDescribeRequest, context: ServicerContext[Any, Any]
    ) -> dit_pb2.DitServiceDescribeResponse:
        """What this DiT is."""
        return dit_pb2.DitServiceDescribeResponse(
            model=self._runner.info,
            single_stage=self.puller is None,
            name=self.name,
            sources=self.sources,
            page_version=PAGE_VERSION,
            wire_version=WIRE_VERSION,
            max_num_seqs=self._admission.limit,
        )

    async def _draw(
        self, request: dit_pb2.DitServiceGenerateRequest, work: _Work, stack: AsyncExitStack
    ) -> AsyncIterator[Response]:
        """A picture from contexts that are pulled."""
        if self.puller is None:
            raise InvalidRequest("work", f"{self.name} is a single stage: it draws whole requests, not from contexts")
        draw = request.draw
        refs = {branch_from_wire(entry.branch): entry.context for entry in draw.contexts}
        picture = add_picture(request, refs, work.id, self._runner.info)  # checked before anything is pulled
        check_kv_room(kv_tokens(picture, self._runner.info, self._runner.context_ranks), self._runner.kv_tokens)
        # All requests wait for room first and for a place second, so that two never wait for each other.
        needed = [ref for ref in refs.values() if ref.segments]
        # A request that has begun was accepted, so it waits as long as it takes.
        wait_s = math.inf if request.begun else None
        async with (
            self.puller.hold(needed, room_wait_s=wait_s, here=self._runner.here) as held,
            AsyncExitStack() as far,
        ):
            wanted, lacking = self._wanted(refs) if self._runner.here else (0, 0)
            elsewhere: list[HeldElsewhere] = []
            # One after the other, in one order for all requests, so that no two wait for each other's room.
            for node in self._runner.nodes:
                elsewhere.append(await far.enter_async_context(node.hold(needed, wait_s)))
            held.elsewhere += [each.fetch for each in elsewhere]
            wanted, lacking = (
                sum(counts) for counts in zip((wanted, lacking), *(each.counts for each in elsewhere), strict=True)
            )
            work.counts |= {"pulled_bytes": lacking, "kv_reused_bytes": wanted - lacking}
            # Pages are pulled while the request waits for its place.
            fetching = asyncio.create_task(held.fetch())
            try:
                await stack.enter_async_context(self._admission.admit(begun=request.begun))
                yield Response(admitted=dit_pb2.Admitted(waited_seconds=work.lap("queue")))
                await self._land(picture, refs, work, held, elsewhere, fetching)
            finally:
                fetching.cancel()
                # Over before `hold` gives back the room that it writes to. Not by `gather`, which a second cancel, as
                # when the connection breaks meanwhile, leaves with an error that nobody takes.
                await asyncio.wait({fetching})
                if not fetching.cancelled():
                    fetching.exception()  # told where it was awaited
        async for response in self._follow(work, stack):
            yield response

    async def _land(
        self,
        picture: AddPicture,
        refs: Mapping[BranchName, kv_pb2.ContextRef],
        work: _Work,
        held: HeldContexts,
        elsewhere: Sequence[HeldElsewhere],
        fetching: asyncio.Task[None],
    ) -> None:
        """Give the runner the picture and its pages as they land, until it has copied them all."""
        assert self.puller is not None
        # First, as pages of a picture that the engine does not know are dropped.
        self._runner.send(picture)
        here = refs if self._runner.here else {}
        with PageLoader(self.puller.store, here, lambda pages: self._runner.send(LoadPages(work.id, pages))) as loader:
            landing = asyncio.gather(fetching, *(each.land(work.id, refs) for each in elsewhere))
            # What it fails with once the request has ended is nobody's to take, and would be logged as forgotten.
            landing.add_done_callback(lambda done: done.cancelled() or done.exception())
            await self._unless_failed(work, landing)
            # Pages that wait for the loop's next turn must come before Begin.
            loader.flush()
        loader.check()
        self._runner.send(Begin(work.id))
        begun = await work.next()
        assert isinstance(begun, Begun)
        log.info(
            "contexts landed",
            pages=len(loader.times),
            pulled_bytes=work.counts["pulled_bytes"],
            first_page_at=loader.times[0] if loader.times else None,
            last_page_at=loader.times[-1] if loader.times else None,
            layers_ahead=begun.layers_ahead,
            # A step that has not begun early can begin now.
            first_step_at=time.monotonic() if begun.first_step_at is None else begun.first_step_at,
        )
        held.check()  # only now: until it had begun, the runner read the pages in the store's memory
        for each in elsewhere:
            await each.check()
        work.steps = begun.steps
        self._runner.begin(begun)
        work.lap("transfer", pages=len(loader.times), pulled_bytes=work.counts["pulled_bytes"])

    async def _serve(
        self, request: dit_pb2.DitServiceGenerateRequest, work: _Work, stack: AsyncExitStack
    ) -> AsyncIterator[Response]:
        """A whole request: the single stage."""
        if self.puller is not None:
            raise InvalidRequest("work", f"{self.name} draws from contexts; start it with --single-stage for this")
        modality_from_wire(request.request.modality)
        output = output_from_wire(request)
        # Before it has a place: reading large images must not keep others from theirs.
        asked = await self._read(request.request)
        if request.check_only:
            self._runner.send(AddRequest(work.id, asked, output, check_only=True))
            await work.next()  # Planned, or the error that it was refused with
            return
        if any(part.HasField("image") for part in request.request.prompt):
            work.lap("context")
        await stack.enter_async_context(self._admission.admit(begun=request.begun))
        admitted = dit_pb2.Admitted(waited_seconds=work.lap("queue"))
        yield Response(admitted=admitted)
        self._runner.send(AddRequest(work.id, asked, output))
        async for response in self._follow(work, stack):
            yield response

    async def _read(self, message: common_pb2.Request) -> Request:
        """The request of a message, its images read: decoded and resized."""
        edits = modality_from_wire(message.modality) is Modality.IMG2IMG
        images = await resized_images(self._images, message.prompt, self._runner.info, for_generation=edits)
        request = await asyncio.to_thread(request_from_wire, message, images)
        for part in message.prompt:
            if part.HasField("image"):
                part.image.ClearField("data")  # only the pixels are needed from here on
        return request

    async def _follow(self, work: _Work, place: AsyncExitStack) -> AsyncIterator[Response]:
        """Pass on the events of the engine until the end. The place is given back once the work is done."""
        while True:
            event = await work.next()
            match event:
                case Planned():
                    pass
                case PromptRead():
                    work.lap("context")
                case Prefilled():
                    work.counts |= {"computed_tokens": event.computed, "reused_tokens": event.tokens - event.computed}
                    work.lap("context", computed_tokens=event.computed, tokens=event.tokens)
                    yield Response(prefill=common_pb2.PrefillDone(tokens=event.tokens))
                case Begun():
                    work.steps = event.steps
                    self._runner.begin(event)
                case StepTaken(step=step):
                    if step % WINDOW == 0 or step == work.steps:
                        work.lap("denoise", first_step=(step - 1) // WINDOW * WINDOW + 1, last_step=step)
                    yield Response(step=common_pb2.StepDone(step=step, steps=work.steps))
                case Text():
                    delta = common_pb2.TextDelta(text=event.text, think=event.think, tokens=event.tokens)
                    yield Response(text=delta)
                case TextDone():
                    if event.token_ids:
                        work.lap("text", tokens=len(event.token_ids))
                    work.text = event
                case Previewed():
                    preview = common_pb2.Preview(index=event.index, step=event.step, picture=_picture(event))
                    yield Response(preview=preview)
                case Drawn():
                    # Before the answer is sent, so that a slow reader holds no place.
                    await place.aclose()
                    work.clock.timings["decode"] = event.seconds
                    self._keep_profile(work, event)
                    record("decode", time.perf_counter() - event.seconds, width=event.width, height=event.height)
                    yield Response(picture=_picture(event))
                    break
                case Done():
                    await place.aclose()
                    break
        log.info("done", seconds={stage: round(seconds, 4) for stage, seconds in work.clock.timings.items()})
        yield Response(finished=_finished(work))

    async def _unless_failed(self, work: _Work, fetching: asyncio.Future[Any]) -> None:
        """Wait for the pull; what the runner fails with meanwhile ends the wait."""
        # Cancelling it loses no event: a queue's `get` takes one only when it returns.
        failing = asyncio.create_task(work.next())
        try:
            await asyncio.wait({fetching, failing}, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                failing.result()
            await fetching
        finally:
            failing.cancel()
            fetching.cancel()

    def _wanted(self, refs: Mapping[BranchName, kv_pb2.ContextRef]) -> tuple[int, int]:
        """Bytes of the contexts' distinct segments: of all, and of those that are not here yet."""
        assert self.puller is not None
        store = self.puller.store
        lengths = {segment.digest: segment.length for ref in refs.values() for segment in ref.segments}
        nbytes = {digest: store.layout.segment_bytes(length) for digest, length in lengths.items()}
        return sum(nbytes.values()), sum(each for digest, each in nbytes.items() if not store.is_complete(digest))

    def _keep_profile(self, work: _Work, drawn: Drawn) -> None:
        """Keep what the runner has measured, for the caller, and log it."""
        if drawn.profile:
            work.profile = stages_before(work.clock.timings) | dict(drawn.profile)
            seconds = {stage: round(seconds, 4) for stage, seconds in work.profile.items()}
            log.info("diffusion profile", width=drawn.width, height=drawn.height, seconds=seconds)


def _picture(drawn: Drawn | Previewed) -> common_pb2.Picture:
    data = drawn.picture
    assert isinstance(data, bytes), "a picture came as an image, though its output names a format"
    return common_pb2.Picture(format=picture_format(data), data=data, width=drawn.width, height=drawn.height)


def _finished(work: _Work) -> dit_pb2.DitServiceGenerateFinished:
    written = work.text
    counts = work.counts | dict(written.counts if written else {}) | {"steps": work.steps}
    return dit_pb2.DitServiceGenerateFinished(
        text=written.text if written else "",
        token_ids=written.token_ids if written else (),
        usage=common_pb2.Usage(**counts),
        timings=timings_to_wire(work.clock.timings),
        profile=timings_to_wire(work.profile),
    )
