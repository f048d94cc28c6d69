"""ThinkerService: one context a call, announced first, then computed; text as it is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from grpc.aio import ServicerContext

from bagel.checkpoint.limits import check_positions
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import (
    ChainExtended,
    ContextDone,
    ContextEvent,
    ContextFailed,
    ContextRequest,
    PromptComputed,
    TextWritten,
)
from bagel.errors import Draining
from bagel.images import ResizedImage
from bagel.images.pool import ImagePool
from bagel.kv.codec import PAGE_VERSION
from bagel.kv.digests import SegmentKind
from bagel.kv.lease_keeper import LeaseKeeper, LocalLessor
from bagel.request import TextSettings
from bagel.rpc.admission import Admission
from bagel.rpc.coalescing_queue import CoalescingQueue
from bagel.rpc.convert import posterior_from_wire, prompt_from_wire, text_settings_from_wire, timings_to_wire
from bagel.rpc.errors import streaming, unary
from bagel.rpc.integrity import WIRE_VERSION
from bagel.rpc.prompt_images import resized_images
from bagel.telemetry.logs import Log
from bagel.telemetry.stages import StageClock
from bagel.telemetry.tracing import record
from bagel.v1 import common_pb2, kv_pb2, thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceServicer
from bagel_thinker.engine import Engine
from bagel_thinker.head_start import HeadStart
from bagel_thinker.post import Post

Response = thinker_pb2.BuildContextResponse
FEW_BUILDS = 8
MESSAGES_PER_S = 3000
"""Most pieces of text a second that are sent together, if more than FEW_BUILDS contexts are built at once."""
log = Log("bagel.thinker")


@dataclass(eq=False)
class _Build:
    """One call: the events of the engine's thread, and where the time goes."""

    post: Post
    events: CoalescingQueue[ContextEvent] = field(default_factory=lambda: CoalescingQueue[ContextEvent](_join))
    clock: StageClock = field(default_factory=StageClock)

    def emit(self, event: ContextEvent) -> None:
        """Pass an event on from the engine's thread."""
        self.post.send(self.events.put, event)

    def lap(self, stage: str, **attributes: int) -> None:
        """Count the time since the last lap to a stage, a span of the trace."""
        record(stage, *self.clock.lap(stage), **attributes)


def pause_s(builds: int) -> float:
    """Seconds after a piece of text in which the next ones are joined, so that messages do not outrun the loop.

    Each costs more than the tokens in it, and takes the interpreter from the engine's thread.
    """
    return 0.0 if builds <= FEW_BUILDS else builds / MESSAGES_PER_S


def _join(one: ContextEvent, other: ContextEvent) -> ContextEvent | None:
    """Pieces of text that wait to be sent become one."""
    if isinstance(one, TextWritten) and isinstance(other, TextWritten):
        return TextWritten(one.text + other.text, other.tokens)
    return None


class ThinkerServicer(ThinkerServiceServicer):
    """Serves one engine. name: what peers call this service.

    admission: places for the texts written at once; images: a pool that reads them; room_wait_s: longest wait for room
    in the store; draining: set once no new context may be begun.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        admission: Admission,
        images: ImagePool,
        *,
        lease_s: float,
        room_wait_s: float,
        draining: asyncio.Event,
    ) -> None:
        self.engine, self.name, self.admission, self._images = engine, name, admission, images
        self.lease_s, self._room_wait_s, self._draining = lease_s, room_wait_s, draining
        self._under_way = self._waiting_for_room = 0
        self._planning = asyncio.Lock()
        self._builds: set[_Build] = set()
        self._loop_post: Post | None = None
        engine.failed.add_done_callback(self._report_failure)

    def idle(self) -> bool:
        """Whether no context is built or leased."""
        return not self._under_way and not self.engine.store.stats().leases

    @streaming
    async def BuildContext(
        self, request: thinker_pb2.BuildContextRequest, context: ServicerContext[Any, Any]
    ) -> AsyncIterator[Response]:
        """Build one context; its first event, before it is computed, is the ContextRef."""
        if self._draining.is_set():
            raise Draining(f"{self.name} is shutting down and takes no new requests; try again, or another Thinker")
        with self._counted(), HeadStart(self.engine) as head:
            build = _Build(self._post())
            # Before it has a place: reading large images must not keep texts from theirs.
            chain = await self._chain(request, head)
            if request.check_only:
                return
            if any(part.HasField("image") for part in request.parts):
                build.lap("context")
            # A context alone takes one short turn at the engine; a text has a place in its batch until its end.
            async with self.admission.admit(begun=request.begun) if request.HasField("decode") else nullcontext():
                if request.HasField("decode"):
                    build.lap("queue")
                # Closed with the call, so that its lease does not live until the generator is collected.
                async with aclosing(self._build(request, chain, build)) as responses:
                    async for response in responses:
                        yield response

    async def _build(
        self, request: thinker_pb2.BuildContextRequest, chain: Chain, build: _Build
    ) -> AsyncGenerator[Response, None]:
        lease = await self._lease(chain, request.lease_id) if request.send_kv else ""
        wanted = self._context_request(request, chain, build, lease)
        finished = False
        keeper = LeaseKeeper(LocalLessor(self.engine.store))
        if lease:  # until the call ends its caller is the holder
            keeper.add(lease, self.lease_s)
        # Beside the engine's thread, so that a long step does not let the lease lapse.
        renewing = asyncio.create_task(keeper.renew())
        self._builds.add(build)
        try:
            self.engine.submit(wanted)
            # Before what the engine says, so that a DiT can pull while it computes.
            yield Response(context=self._ref(chain, lease))
            while not finished:
                event = await build.events.get()
                match event:
                    case ContextFailed():
                        raise event.error
                    case PromptComputed():
                        build.lap("context")
                    case TextWritten():
                        delta = common_pb2.TextDelta(text=event.text, think=wanted.append, tokens=event.tokens)
                        yield Response(text=delta)
                        if pause := pause_s(len(self._builds)):
                            await asyncio.sleep(pause)
                    case ChainExtended():
                        build.lap("text")
                        yield Response(context=self._ref(event.chain, lease))
                    case ContextDone():
                        finished = True
                        build.lap(
                            "context" if wanted.append or wanted.settings is None else "text",
                            written_tokens=len(event.token_ids),
                        )
                        built = _built(event, think=wanted.append, build=build)
                        _record_segments(event, self.engine.store.layout.layers)
                        _log_built(built, event.layer_times)
                        yield Response(built=built)
        finally:
            self._builds.discard(build)
            renewing.cancel()
            # The lease of a finished context stays: a DiT takes it over.
            if not finished:
                self.engine.cancel(wanted)
                keeper.release()

    @unary
    async def Describe(
        self, request: thinker_pb2.ThinkerServiceDescribeRequest, context: ServicerContext[Any, Any]
    ) -> thinker_pb2.ThinkerServiceDescribeResponse:
        """What this Thinker is."""
        return thinker_pb2.ThinkerServiceDescribeResponse(
            model=self.engine.info,
            engine=self.engine.name,
            name=self.name,
            page_version=PAGE_VERSION,
            wire_version=WIRE_VERSION,
            max_num_seqs=self.admission.limit,
        )

    def _post(self) -> Post:
        """The one post from the engine's thread to the event loop."""
        if self._loop_post is None:
            self._loop_post = Post(asyncio.get_running_loop())
        return self._loop_post

    def _report_failure(self, failed: Future[None]) -> None:
        """Report an engine's failure to every build: an engine that hangs cannot do so itself."""
        error = None if failed.cancelled() else failed.exception()
        # A copy, as this may run on the engine's thread while calls come and go.
        for build in list(self._builds):
            if isinstance(error, Exception):
                build.emit(ContextFailed(error))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _chain(self, request: thinker_pb2.BuildContextRequest, head: HeadStart) -> Chain:
        # Where others wait for room, this one may never get any, and nothing is computed for it before it does.
        begin = None if request.check_only or self._waiting_for_room else head.begin
        images = await resized_images(self._images, request.parts, self.engine.info, on_first=begin)
        # Of contexts with the same image the first to come is planned first, and begins first: a picture's own context
        # comes before its guidance's, and has the text that is computed together with the image.
        async with self._planning if images else nullcontext():
            # In a thread, as a long text must not hold up other calls.
            return await asyncio.to_thread(self._plan, request, images)

    def _plan(self, request: thinker_pb2.BuildContextRequest, images: Sequence[ResizedImage]) -> Chain:
        """The chain of a request's parts; InvalidRequest or InvalidImage if it cannot be built."""
        prompt, planner = prompt_from_wire(request.parts, images), self.engine.planner
        prepared = planner.prepare_images(prompt, posterior_from_wire(request.posterior), request.seed)
        chain = planner.chain(prompt, prepared)
        written = _settings(request).max_tokens if request.HasField("decode") else 0
        check_positions(chain.rope, written, self.engine.info.max_positions)
        return chain

    def _context_request(
        self, request: thinker_pb2.BuildContextRequest, chain: Chain, build: _Build, lease: str
    ) -> ContextRequest:
        def emit(event: ContextEvent) -> None:
            if isinstance(event, ChainExtended) and lease:
                # Before the engine goes on: it stores only what a lease has reserved.
                self.engine.store.extend(lease, event.chain.lengths)
            build.emit(event)

        settings = _settings(request) if request.HasField("decode") else None
        return ContextRequest(chain, request.seed, emit, settings, append=request.decode.append)

    async def _lease(self, chain: Chain, lease_id: str) -> str:
        store, wait_s = self.engine.store, self._room_wait_s
        self._waiting_for_room += 1
        try:
            return await store.lease_in_time(chain.lengths, self.lease_s, lease_id, wait_s=wait_s)
        finally:
            self._waiting_for_room -= 1

    def _ref(self, chain: Chain, lease: str) -> kv_pb2.ContextRef:
        return kv_pb2.ContextRef(
            segments=[kv_pb2.SegmentRef(digest=digest, length=length) for digest, length in chain.lengths],
            next_rope=chain.rope,
            source=self.name,
            lease_id=lease,
            lease_seconds=self.lease_s,
            fingerprint=self.engine.store.fingerprint,
            page_version=PAGE_VERSION,
        )


def _record_segments(done: ContextDone, layers: int) -> None:
    """A span for every segment computed with its layers one by one: from its first layer's K/V to its last's."""
    # Layers are timed by time.monotonic, spans by time.perf_counter.
    ahead = time.perf_counter() - time.monotonic()
    for digest, times in done.layer_times.items():
        if digest in done.computed and len(times) == layers:
            record("prefill", times[0] + ahead, times[-1] + ahead, tokens=done.computed[digest])


def _log_built(built: thinker_pb2.ContextBuilt, layer_times: Mapping[bytes, Sequence[float]]) -> None:
    """One line a context. layer_times are those of time.monotonic, which all processes of a machine share."""
    times = [each for of_segment in layer_times.values() for each in of_segment]
    log.info(
        "context built",
        computed_tokens=built.usage.computed_tokens,
        reused_tokens=built.usage.reused_tokens,
        written_tokens=len(built.token_ids),
        first_layer_at=min(times, default=None),
        last_layer_at=max(times, default=None),
        seconds={timing.stage: round(timing.seconds, 4) for timing in built.timings},
    )


def _settings(request: thinker_pb2.BuildContextRequest) -> TextSettings:
    return text_settings_from_wire(request.decode.settings)


def _built(written: ContextDone, *, think: bool, build: _Build) -> thinker_pb2.ContextBuilt:
    segments = written.context.chain.segments
    of_text = sum(segment.length for segment in segments if segment.kind is SegmentKind.TEXT)
    tokens, computed = len(written.token_ids), sum(written.computed.values())
    return thinker_pb2.ContextBuilt(
        text=written.text,
        token_ids=written.token_ids,
        usage=common_pb2.Usage(
            prompt_tokens=of_text - (segments[-1].length if think else 0),
            image_tokens=written.context.length - of_text,
            completion_tokens=0 if think else tokens,
            think_tokens=tokens if think else 0,
            computed_tokens=computed,
            reused_tokens=written.context.length - computed,
        ),
        timings=timings_to_wire(build.clock.timings),
    )
