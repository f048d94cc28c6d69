"""One request on its way through the stages of its pipeline: calls fan out, events come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

import grpc
from grpc.aio import StreamStreamCall

from bagel.errors import (
    BagelError,
    ContextRefused,
    Draining,
    EngineDied,
    IncompleteContext,
    KvTimeout,
    Loading,
    RemoteError,
    RunnerDied,
    SourceUnavailable,
    UnknownSegment,
)
from bagel.kv.lease_keeper import LeaseKeeper
from bagel.pipelines import kv_collector
from bagel.prompts import BranchName
from bagel.rpc import convert
from bagel.rpc.errors import from_rpc_error
from bagel.telemetry.logs import Log, request_metadata
from bagel.telemetry.stages import stages_before
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2, kv_pb2, thinker_pb2
from bagel_gateway.backends import Backend, DitBackend, ThinkerBackend
from bagel_gateway.planning import Build, Plan, WireParts
from bagel_gateway.uploads import bytes_of, field_of, with_parts

log = Log("bagel_gateway.routing")
R = TypeVar("R")
Remaining = Callable[[], float | None]
"""Seconds until the client's deadline; None without one."""
Put = Callable[[gateway_pb2.GenerateResponse], None]
ChooseDit = Callable[[], Awaitable[DitBackend]]
"""A DiT that is ready; waits for one, and raises NoBackend if none comes."""

MOVES = 4
"""Other DiTs that a request is taken to when one that seemed ready refuses it."""
CAUSE_S = 1.0
"""How long a DiT that lost its K/V waits for the Thinker's own account of why."""
_FROM_THE_THINKER = (ContextRefused, IncompleteContext, KvTimeout, SourceUnavailable)
_OF_THE_PROMPT = ("prompt_tokens", "image_tokens", "completion_tokens", "think_tokens")


class Route:
    """One request, from its plan to its end. Ends with the first error of a stage; all other calls are cancelled.

    put: hears what happens, the last event `finished`; it does not wait for whoever reads it.
    accepted: its first event, told once every stage that it needs at its beginning has taken it on. Until then it may
    be refused as busy; from then on it waits for its places. begun: it is told at once, as to one more result of a call
    that was accepted. waited_s: seconds that it waited for its place, which is part of its queue and of its total.
    """

    def __init__(
        self,
        plan: Plan,
        thinker: ThinkerBackend | None,
        choose_dit: ChooseDit,
        remaining: Remaining,
        put: Put,
        accepted: gateway_pb2.Accepted,
        waited_s: float = 0.0,
        *,
        begun: bool = False,
    ) -> None:
        self._plan, self._thinker, self._choose_dit, self._remaining = plan, thinker, choose_dit, remaining
        self._put = put
        loop = asyncio.get_running_loop()
        self._handed_over: list[asyncio.Future[kv_pb2.ContextRef]] = [loop.create_future() for _ in plan.builds]
        self._built: dict[int, thinker_pb2.ContextBuilt] = {}
        self._lengths: dict[int, int] = {}
        self._told_prefill = self._dit_began = False
        self._begun = asyncio.Event()
        self._accepted = gateway_pb2.GenerateResponse(accepted=accepted)
        self._held_back: list[gateway_pb2.GenerateResponse] = []
        self._leases = None if thinker is None else LeaseKeeper(thinker.lessor)
        self._started, self._waited_s = time.perf_counter(), waited_s
        if begun:
            self._begin()

    async def run(self) -> None:
        """Serve it; raises the BagelError of the stage that failed. Cancelled it cancels its calls."""
        if self._plan.whole is not None:
            finished = await self._serve_whole(self._plan.whole, self._plan.parts)
        elif self._plan.draw is None:
            finished = await self._answer()
        else:
            finished = await self._draw_picture(self._plan.draw)
        self._tell_times(finished)
        self._tell(gateway_pb2.GenerateResponse(finished=finished))

    def _tell_times(self, finished: gateway_pb2.Finished) -> None:
        """Add what only the gateway knows."""
        timings = convert.timings_from_wire(finished.timings)
        if self._waited_s:
            timings = {"queue": self._waited_s + timings.pop("queue", 0.0), **timings}
        timings["total"] = time.perf_counter() - self._started + self._waited_s
        del finished.timings[:]
        finished.timings.extend(convert.timings_to_wire(timings))

    async def _serve_whole(self, request: common_pb2.Request, prompt: WireParts) -> gateway_pb2.Finished:
        """The single stage."""
        end = await self._call_dit(dit_pb2.DitServiceGenerateRequest(request=request), prompt)
        return gateway_pb2.Finished(
            text=end.text,
            token_ids=end.token_ids,
            usage=end.usage,
            timings=convert.timings_to_wire(_without_total(end.timings)),
            profile=end.profile,
        )

    async def _answer(self) -> gateway_pb2.Finished:
        """Text in two stages: the Thinker alone."""
        built = await self._build(0, self._plan.builds[0])
        return gateway_pb2.Finished(
            text=built.text,
            token_ids=built.token_ids,
            usage=built.usage,
            timings=convert.timings_to_wire(_without_total(built.timings)),
        )

    async def _draw_picture(self, picture: dit_pb2.DrawPicture) -> gateway_pb2.Finished:
        """A picture in two stages, its contexts kept until the DiT has taken them over."""
        assert self._leases is not None
        renewing = asyncio.create_task(self._leases.renew())
        try:
            return await self._run_stages(picture)
        except BaseException:
            self._leases.release()
            raise
        finally:
            renewing.cancel()

    async def _run_stages(self, picture: dit_pb2.DrawPicture) -> gateway_pb2.Finished:
        """All contexts at once, and the DiT as soon as the pipeline hands them over."""
        try:
            async with asyncio.TaskGroup() as group:
                builds = [
                    group.create_task(self._build(number, build)) for number, build in enumerate(self._plan.builds)
                ]
                drawing = group.create_task(self._draw(picture, builds))
        except BaseExceptionGroup as failed:
            raise _first_error(failed) from None
        return self._merge(drawing.result())

    async def _build(self, number: int, build: Build) -> thinker_pb2.ContextBuilt:
        """One context. Its K/V are handed over as the pipeline says: at once, or when its sequence has ended."""
        handed_over, refs = self._handed_over[number], list[kv_pb2.ContextRef]()
        assert self._thinker is not None
        lease_id = self._leases.new() if build.settings.send_kv and self._leases is not None else ""

        def message() -> list[bytes]:
            settings = thinker_pb2.BuildContextRequest(begun=self._begun.is_set(), lease_id=lease_id)
            settings.MergeFrom(build.settings)
            return with_parts(settings, "parts", build.parts)

        nbytes = bytes_of(build.parts)
        call = self._thinker.build(message, nbytes, timeout=self._remaining(), metadata=request_metadata())
        async for event in _responses(call, self._thinker):
            match event.WhichOneof("event"):
                case "context":
                    refs.append(event.context)
                    if self._leases is not None:
                        self._leases.hold(event.context.lease_id, event.context.lease_seconds)
                    self._lengths[number] = sum(segment.length for segment in event.context.segments)
                    self._begin_if_built()
                    # The second context of a think run is the one with the think text.
                    if not handed_over.done() and (self._early or (build.thinks and len(refs) == 2)):
                        handed_over.set_result(event.context)
                case "text":
                    await self._begun.wait()  # for the other contexts, which may have to wait for room
                    self._tell_answer_begins(build)
                    self._emit(text=common_pb2.TextDelta(text=event.text.text, think=build.thinks))
                case "built":
                    self._built[number] = event.built
        return self._end_of_build(number, refs)

    def _end_of_build(self, number: int, refs: list[kv_pb2.ContextRef]) -> thinker_pb2.ContextBuilt:
        if number not in self._built or not refs:
            assert self._thinker is not None
            raise RemoteError(f"{self._thinker.name} ended a context without its result", "INTERNAL")
        if not self._handed_over[number].done():
            self._handed_over[number].set_result(refs[-1])
        if len(self._built) == len(self._plan.builds):
            self._tell_prefill()
        return self._built[number]

    @property
    def _early(self) -> bool:
        """Whether contexts are handed over before they are computed, so that the DiT takes part from the beginning."""
        return self._plan.pipeline.stages[0].omni_kv_config.kv_transfer_criteria is not None

    def _begin_if_built(self) -> None:
        """All contexts are taken on: an answer, or a think text before a picture, has begun; what is drawn at once
        begins with its place at a DiT.
        """
        draws_at_once = self._plan.draw is not None and self._early
        if len(self._lengths) == len(self._plan.builds) and not draws_at_once:
            self._begin()

    def _tell_answer_begins(self, build: Build) -> None:
        """An answer's prompt is read once its first text comes; a picture's contexts may still be computed then."""
        if not build.thinks:
            self._tell_prefill()

    def _tell_prefill(self) -> None:
        if not self._told_prefill:
            self._told_prefill = True
            self._emit(prefill=common_pb2.PrefillDone(tokens=sum(self._lengths.values())))

    async def _draw(
        self, picture: dit_pb2.DrawPicture, builds: list[asyncio.Task[thinker_pb2.ContextBuilt]]
    ) -> dit_pb2.DitServiceGenerateFinished:
        refs = await asyncio.gather(*self._handed_over)
        draw = dit_pb2.DrawPicture()
        draw.CopyFrom(picture)
        draw.contexts.extend(self._collect(refs))
        try:
            return await self._call_dit(dit_pb2.DitServiceGenerateRequest(draw=draw))
        except _FROM_THE_THINKER as error:
            # What went wrong went wrong at the Thinker; its own error, if one comes, is told instead.
            with suppress(asyncio.CancelledError):  # a build has failed, perhaps for want of what this DiT gave back
                await asyncio.wait(builds, timeout=CAUSE_S, return_when=asyncio.FIRST_EXCEPTION)
            raise error

    def _collect(self, refs: list[kv_pb2.ContextRef]) -> list[dit_pb2.BranchContext]:
        """The contexts of all branches needed; one without parts is empty and was not built."""
        contexts = {name: ref for build, ref in zip(self._plan.builds, refs, strict=True) for name in build.branches}
        gen = contexts[BranchName.GEN]
        for name in self._plan.empty:
            contexts[name] = kv_pb2.ContextRef(source=gen.source, fingerprint=gen.fingerprint)
        collect = kv_collector(self._plan.pipeline.stages[1])
        collected = collect(self._plan.branches, contexts, self._plan.needed)
        return [
            dit_pb2.BranchContext(branch=convert.branch_to_wire(name), context=ref) for name, ref in collected.items()
        ]

    async def _call_dit(
        self, request: dit_pb2.DitServiceGenerateRequest, prompt: WireParts | None = None
    ) -> dit_pb2.DitServiceGenerateFinished:
        """The DiT's part, at one that is ready when its turn comes. What one refuses as it shuts down, another gets."""
        output = self._plan.output
        request.output_format, request.partial_images = output.format, output.previews
        if output.quality is not None:
            request.output_compression = output.quality
        moves = 0
        while True:
            dit = await self._choose_dit()
            request.begun = self._begun.is_set()
            try:
                with dit.busy():
                    return await self._follow(dit, request, prompt or [])
            except BagelError as error:
                going = isinstance(error, Draining | Loading) or _unreachable(error)
                if self._dit_began or dit.silent.is_set() or not going or moves == MOVES:
                    raise
                moves += 1
                log.info("refused by a DiT; another is chosen", dit=str(dit.address), **error.for_log())

    async def _follow(
        self, dit: DitBackend, request: dit_pb2.DitServiceGenerateRequest, prompt: WireParts
    ) -> dit_pb2.DitServiceGenerateFinished:
        """The call of one DiT; its events go on as they come. prompt: of a whole request, put in when it is sent."""

        def message() -> list[bytes]:
            if not prompt:
                return [request.SerializeToString()]
            others = dit_pb2.DitServiceGenerateRequest()
            others.CopyFrom(request)
            others.ClearField("request")
            return _whole(others, request.request, prompt)

        metadata = request_metadata()
        call = dit.generate(message, bytes_of(prompt), timeout=self._remaining(), metadata=metadata)
        finished, admitted = None, dit_pb2.Admitted()
        async for event in _responses(call, dit):
            self._dit_began = True
            if self._leases is not None:
                self._leases.hand_over()
            match event.WhichOneof("event"):
                case "admitted":
                    admitted = event.admitted
                    self._begin()
                    if self._plan.draw is not None:
                        self._tell_drawing(admitted)
                case "prefill":
                    self._emit(prefill=event.prefill)
                    if self._plan.makes_image:  # a single stage draws once it has read
                        self._tell_drawing(admitted)
                case "text":
                    self._emit(text=event.text)
                case "step":
                    self._emit(step=event.step)
                case "preview":
                    self._emit(preview=event.preview)
                case "picture":
                    self._emit(picture=event.picture)
                case "finished":
                    finished = event.finished
        if finished is None:
            raise RemoteError(f"{dit.name} ended a request without its result", "INTERNAL")
        return finished

    def _tell_drawing(self, admitted: dit_pb2.Admitted) -> None:
        self._emit(drawing=gateway_pb2.DrawingStarted(waited_seconds=admitted.waited_seconds))

    def _merge(self, drawn: dit_pb2.DitServiceGenerateFinished) -> gateway_pb2.Finished:
        """The end of a picture in two stages. The prompt's tokens are gen's; work is that of all branches."""
        gen = next(i for i, build in enumerate(self._plan.builds) if BranchName.GEN in build.branches)
        text = self._built[gen]
        usage = common_pb2.Usage()
        usage.CopyFrom(drawn.usage)
        for name in _OF_THE_PROMPT:
            setattr(usage, name, getattr(text.usage, name))
        usage.computed_tokens += sum(built.usage.computed_tokens for built in self._built.values())
        usage.reused_tokens += sum(built.usage.reused_tokens for built in self._built.values())
        timings: dict[str, float] = {}
        for built in self._built.values():  # they run side by side
            for stage, seconds in _without_total(built.timings).items():
                timings[stage] = max(seconds, timings.get(stage, 0.0))
        for stage, seconds in _without_total(drawn.timings).items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        profile = convert.timings_from_wire(drawn.profile)
        if profile:  # the DiT knows only its own part
            profile = stages_before(timings) | profile
        return gateway_pb2.Finished(
            text=text.text,
            token_ids=text.token_ids,
            usage=usage,
            timings=convert.timings_to_wire(timings),
            profile=convert.timings_to_wire(profile),
        )

    def _emit(
        self,
        *,
        prefill: common_pb2.PrefillDone | None = None,
        text: common_pb2.TextDelta | None = None,
        drawing: gateway_pb2.DrawingStarted | None = None,
        step: common_pb2.StepDone | None = None,
        preview: common_pb2.Preview | None = None,
        picture: common_pb2.Picture | None = None,
    ) -> None:
        event = gateway_pb2.GenerateResponse(
            prefill=prefill, text=text, drawing=drawing, step=step, preview=preview, picture=picture
        )
        self._tell(event)

    def _tell(self, event: gateway_pb2.GenerateResponse) -> None:
        """Pass an event on, at once or behind `accepted`."""
        if self._begun.is_set():
            self._put(event)
        else:
            self._held_back.append(event)

    def _begin(self) -> None:
        """Tell that the request is accepted, once."""
        if not self._begun.is_set():
            self._begun.set()
            for event in (self._accepted, *self._held_back):
                self._put(event)
            self._held_back.clear()


def joined(
    one: gateway_pb2.GenerateResponse | None, other: gateway_pb2.GenerateResponse | None
) -> gateway_pb2.GenerateResponse | None:
    """Pieces of text that wait to be sent, as one; None for other events."""
    if one is None or other is None or not (one.HasField("text") and other.HasField("text")):
        return None
    if one.text.think != other.text.think:
        return None
    one.text.text += other.text.text
    return one


async def check_plan(plan: Plan, thinker: ThinkerBackend | None, choose_dit: ChooseDit, remaining: Remaining) -> None:
    """Ask the stages whether they could serve a plan; raises what they refuse it with. They compute nothing."""
    if plan.whole is not None:
        dit = await choose_dit()
        others = dit_pb2.DitServiceGenerateRequest(check_only=True)
        pieces = partial(_whole, others, plan.whole, plan.parts)
        whole = dit.generate(pieces, bytes_of(plan.parts), timeout=remaining(), metadata=request_metadata())
        async for _ in _responses(whole, dit):
            pass
    for build in plan.builds:
        assert thinker is not None
        settings = thinker_pb2.BuildContextRequest(check_only=True)
        settings.MergeFrom(build.settings)
        message = partial(with_parts, settings, "parts", build.parts)
        call = thinker.build(message, bytes_of(build.parts), timeout=remaining(), metadata=request_metadata())
        async for _ in _responses(call, thinker):
            pass


def _whole(others: dit_pb2.DitServiceGenerateRequest, request: common_pb2.Request, prompt: WireParts) -> list[bytes]:
    """A single stage's request: the message without it, then it with its prompt."""
    return [others.SerializeToString(), *field_of(others, "request", with_parts(request, "prompt", prompt))]


async def _responses(call: StreamStreamCall[list[bytes], R], backend: Backend) -> AsyncIterator[R]:
    """A call's responses; its errors as BagelErrors. The call is cancelled when the caller leaves.

    RemoteError if the backend falls silent: a process that is stopped, or a network that swallows, ends no call.
    """
    try:
        with backend.waiting(call.cancel):  # which ends the reading
            async for response in call:
                yield response
    except asyncio.CancelledError:
        if backend.silent.is_set() and not _leaving():
            raise RemoteError(f"{backend.name} has not answered for {backend.silence_s:g} s", "UNAVAILABLE") from None
        raise
    except grpc.RpcError as error:
        told = from_rpc_error(error, backend.name, inside=True)
        if _unreachable(told) or isinstance(told, Draining | EngineDied | Loading | RunnerDied):
            backend.lost(str(told), told.hidden)  # the next request need not find out by itself
        raise told from None
    finally:
        call.cancel()


def _leaving() -> bool:
    """Whether the task that runs this is itself cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _unreachable(error: BagelError) -> bool:
    return isinstance(error, RemoteError) and error.grpc_status == "UNAVAILABLE"


def _without_total(timings: Iterable[common_pb2.StageTiming]) -> Mapping[str, float]:
    """Stages alone: the gateway's total is the request's."""
    return {stage: seconds for stage, seconds in convert.timings_from_wire(timings).items() if stage != "total"}


def _first_error(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a stage. What is cancelled after it is no error, and is not in the group.

    A build whose leases were given back, as a DiT that failed does, fails for want of them: that is no cause.
    """
    told = [error for error in failed.exceptions if isinstance(error, BagelError)]
    causes = [error for error in told if not isinstance(error, UnknownSegment)]
    return next(iter([*causes, *told, *failed.exceptions]))
