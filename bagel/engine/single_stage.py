"""Whole requests: planned in a thread, their contexts and texts computed, their pictures handed to the diffusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Lock

from bagel.checkpoint.limits import check_kv_room, row_kv_tokens
from bagel.engine.clock import wait_for
from bagel.engine.commands import AddRequest
from bagel.engine.context import Context, ContextBuilder, SegmentCache
from bagel.engine.events import Done, Event, Planned, Prefilled, PromptRead, StepTimed, Text, TextDone
from bagel.engine.loading import LoadedModel
from bagel.engine.picture import Picture
from bagel.engine.plan import RequestPlan, grid, plan_picture, plan_request
from bagel.engine.prefill_graphs import PrefillGraphs
from bagel.engine.progress import Heartbeat
from bagel.engine.segments import Chain
from bagel.engine.slab import SharedSlab
from bagel.engine.text_scheduler import (
    ContextDone,
    ContextEvent,
    ContextFailed,
    ContextRequest,
    PromptComputed,
    TextScheduler,
    TextWritten,
)
from bagel.images.output import OutputFormat
from bagel.prompts import BranchName
from bagel.request import Request, text_settings


@dataclass
class _Serving:
    """A whole request whose contexts are being computed. left: distinct contexts that are not done yet."""

    plan: RequestPlan
    output: OutputFormat | None
    requests: list[ContextRequest] = field(default_factory=list)
    contexts: dict[BranchName, Context] = field(default_factory=dict)
    left: int = 0
    prefill_emitted: bool = False
    failed: bool = False


class SingleStage:
    """Serves whole requests up to where their pictures are drawn.

    emit: receives what happens; fail: a request's error, on any thread; draw: takes a picture on, with its request's
    id and how it is given out; bucket: the number of latents that a picture of so many is padded to; profile: say that
    contexts are computed once the device is done with them, and not when they are launched.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        space: SharedSlab,
        heartbeat: Heartbeat,
        *,
        max_num_seqs: int,
        emit: Callable[[Event], None],
        fail: Callable[[int, Exception], None],
        draw: Callable[[int, Picture, OutputFormat | None], None],
        bucket: Callable[[int], int],
        profile: bool,
    ) -> None:
        self._loaded, self._space, self._heartbeat = loaded, space, heartbeat
        self._emit, self._fail, self._draw, self._bucket = emit, fail, draw, bucket
        self._profile = profile
        self._lock = Lock()  # around the two that follow, which the planner's thread changes too
        self._planning: dict[int, Future[None]] = {}
        self._planned: dict[int, tuple[RequestPlan, OutputFormat | None]] = {}
        self._serving: dict[int, _Serving] = {}
        # One thread, so that requests are planned in the order in which they came.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._timed: list[StepTimed] = []
        self._cache = SegmentCache()
        self._builder = ContextBuilder(loaded.model, self._cache, PrefillGraphs.over(loaded.model, space))
        self.texts = TextScheduler(
            loaded,
            self._builder,
            space,
            max_num_seqs=max_num_seqs,
            on_write=lambda texts, seconds: self._timed.append(StepTimed("text", texts, seconds)),
        )

    @property
    def busy(self) -> bool:
        """Whether there is anything to read or write."""
        return bool(self._planned) or self.texts.busy

    @property
    def segments_computed(self) -> int:
        """Segments of contexts that no cache had."""
        return self._builder.segments_computed

    def plan(self, request: Request) -> RequestPlan:
        """Plan a request; InvalidRequest or InvalidImage if the model cannot serve it, or its K/V can never fit."""
        plan = plan_request(self._loaded.planner, request, self._loaded.max_model_len)
        self._check_room(plan)
        return plan

    def submit(self, command: AddRequest) -> None:
        """Plan a request in a thread, as long texts and large images must not delay the steps of others."""
        with self._lock:
            self._planning[command.id] = self._thread.submit(self._plan_in_thread, command)

    def add(self, id_: int, plan: RequestPlan, output: OutputFormat | None) -> None:
        """Serve a planned request from the unit of work on that begins with it; emits Planned."""
        with self._lock:
            self._planned[id_] = (plan, output)
        self._emit(Planned(id_))

    def work(self, begin: Sequence[int] = ()) -> list[StepTimed]:
        """One unit of reading and writing, if there is any; the text steps that it took.

        begin: requests that it begins with, once this rank has planned them; those that are over are passed by.
        """
        self._timed = []
        for id_ in begin:
            if (planned := self._take_planned(id_)) is None:
                continue
            try:
                self._begin(id_, *planned)
            except Exception as error:
                self.remove(id_)
                self._fail(id_, error)
        if self.texts.busy:
            try:
                self.texts.work()
            except Exception as error:  # of the scheduler as a whole: which request caused it cannot be known
                self.texts.abandon(error)
        return self._timed

    def drop_cache(self) -> None:
        """Give back the memory of contexts that are only kept for other requests."""
        self._cache.clear()

    def remove(self, id_: int) -> None:
        """Drop a request; nothing if it is over, or drawn."""
        with self._lock:
            self._planning.pop(id_, None)
            self._planned.pop(id_, None)
        if (serving := self._serving.pop(id_, None)) is not None:
            for request in serving.requests:
                self.texts.cancel(request)

    def close(self) -> None:
        """Plan no more."""
        self._thread.shutdown(cancel_futures=True)

    def _plan_in_thread(self, command: AddRequest) -> None:
        with self._lock:  # `submit` has it until the request is noted
            if command.id not in self._planning:
                return  # it was cancelled
        try:
            with self._heartbeat.work():
                plan = self.plan(command.request)
        except Exception as error:
            self._fail(command.id, error)
            return
        if command.check_only:
            self._emit(Planned(command.id))
            return
        with self._lock:
            if command.id not in self._planning:
                return  # cancelled meanwhile: nobody would remove what is added now
            self._planned[command.id] = (plan, command.output)
        self._emit(Planned(command.id))  # after it is added: the step plan that this leads to must find it

    def _take_planned(self, id_: int) -> tuple[RequestPlan, OutputFormat | None] | None:
        """Take out a request once it is planned; None if it is over, or was only to be checked."""
        if (planning := self._planning.get(id_)) is not None:
            wait([planning])  # done long ago on the rank that answers, perhaps not yet on the others
        with self._lock:
            self._planning.pop(id_, None)
            return self._planned.pop(id_, None)

    def _check_room(self, plan: RequestPlan) -> None:
        """Refuse a request that can never find room for its K/V."""
        needed = 0
        if plan.draws:
            rows, columns = grid(self._loaded.planner, plan.size)
            padded = self._bucket(rows * columns)
            chains = {chain.digest: chain.length for chain in plan.chains.values()}
            needed = self._space.needed([row_kv_tokens(length, padded) for length in chains.values()])
        if plan.writes:
            text = plan.chain.length + text_settings(plan.request).max_tokens
            # Not the sum: the text has given its room back when the picture takes its own.
            needed = max(needed, self._space.needed([text]))
        check_kv_room(needed, self._space.size)

    def _begin(self, id_: int, plan: RequestPlan, output: OutputFormat | None) -> None:
        """Begin to compute a request's contexts, each distinct one once."""
        serving = self._serving[id_] = _Serving(plan, output)
        chains = plan.chains if plan.draws else {BranchName.GEN: plan.chain}
        distinct: dict[tuple[bytes, bool], list[BranchName]] = {}
        for name, chain in chains.items():
            # The think text makes gen's context another one than that of a branch with the same prompt.
            distinct.setdefault((chain.digest, name is BranchName.GEN and plan.writes), []).append(name)
        serving.left = len(distinct)
        for (_, writes), names in distinct.items():
            serving.requests.append(self._context_request(id_, serving, chains[names[0]], names, writes=writes))
        for request in serving.requests:
            self.texts.add(request)

    def _context_request(
        self, id_: int, serving: _Serving, chain: Chain, names: list[BranchName], *, writes: bool
    ) -> ContextRequest:
        plan = serving.plan

        def emit(event: ContextEvent) -> None:
            match event:
                case PromptComputed():
                    self._settle()
                    self._emit(PromptRead(id_))
                    self._emit_prefill(id_, serving)
                case TextWritten():
                    self._emit(Text(id_, event.text, think=plan.draws, tokens=event.tokens))
                case ContextDone():
                    self._context_done(id_, serving, names, event, writes=writes)
                case ContextFailed() if not serving.failed:  # of several contexts, the first error is reported
                    serving.failed = True
                    self.remove(id_)
                    self._fail(id_, event.error)

        settings = text_settings(plan.request) if writes else None
        return ContextRequest(chain, plan.request.seed, emit, settings, append=plan.draws and writes)

    def _context_done(
        self, id_: int, serving: _Serving, names: list[BranchName], done: ContextDone, *, writes: bool
    ) -> None:
        serving.contexts |= dict.fromkeys(names, done.context)
        serving.left -= 1
        if writes:
            self._emit(TextDone(id_, done.text, done.token_ids, _counts(serving.plan, len(done.token_ids))))
        if not serving.left:
            self._all_done(id_, serving)

    def _emit_prefill(self, id_: int, serving: _Serving) -> None:
        """An answer's prompt is its whole prefill; a picture's ends with the last of its contexts."""
        if serving.prefill_emitted or (serving.plan.draws and serving.left):
            return
        serving.prefill_emitted = True
        computed = sum(sum(request.computed.values()) for request in serving.requests)
        chains = [context.chain for context in serving.contexts.values()] or [each.chain for each in serving.requests]
        segments = {segment.digest: segment.length for chain in chains for segment in chain.segments}
        self._emit(Prefilled(id_, sum(segments.values()), computed))

    def _all_done(self, id_: int, serving: _Serving) -> None:
        """An answer is over; a picture is drawn from now on."""
        plan = serving.plan
        del self._serving[id_]
        self._settle()
        self._emit_prefill(id_, serving)
        if not plan.draws:
            self._emit(Done(id_))
            return
        if not plan.writes:
            self._emit(TextDone(id_, "", (), _counts(plan, 0)))
        self._draw(id_, plan_picture(self._loaded.planner, plan, serving.contexts), serving.output)

    def _settle(self) -> None:
        """Where stages are timed, the next one begins when the device gets to it."""
        if self._profile:
            wait_for(self._loaded.model.device)


def _counts(plan: RequestPlan, tokens: int) -> dict[str, int]:
    """What a request used, as fields of bagel.v1.Usage; branches that are equal count once."""
    images = sum(segment.length for segment in plan.chain.segments if segment.image is not None)
    kind = "think_tokens" if plan.draws else "completion_tokens"
    return {"prompt_tokens": plan.chain.length - images, "image_tokens": images, kind: tokens}
