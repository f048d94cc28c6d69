"""Whole requests in a runner, for the single stage: planned in a thread, read here, their pictures handed on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bagel.checkpoint.limits import check_kv_room, padded_latents, row_kv_tokens
from bagel.engine.context import Context, ContextBuilder, SegmentCache
from bagel.engine.loading import LoadedModel
from bagel.engine.plan import RequestPlan, grid, plan_picture, plan_request
from bagel.engine.sampler import Picture
from bagel.engine.slab import SharedSlab
from bagel.engine.text_scheduler import Reader, Reading, Written
from bagel.prompts import BranchName
from bagel.request import text_settings
from bagel.rpc.convert import request_from_wire
from bagel.v1 import common_pb2
from bagel_dit.messages import (
    Done,
    Output,
    Planned,
    Prefilled,
    PromptRead,
    Read,
    Reply,
    Serve,
    Text,
    TextDone,
    Timed,
)
from bagel_dit.pulse import Pulses


@dataclass
class _Serving:
    """A whole request. plan: None until it is made; left: distinct contexts that are not built yet."""

    output: Output
    plan: RequestPlan | None = None
    readings: list[Reading] = field(default_factory=list)
    contexts: dict[BranchName, Context] = field(default_factory=dict)
    left: int = 0
    told_prefill: bool = False


class WholeRequests:
    """Serves requests up to where their pictures are drawn.

    send: tells the server; fail and tell_failed: of a request's error, the latter from any thread and without
    forgetting the request; draw: takes a picture on, with its request's id and how it is given out.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_num_seqs: int,
        *,
        send: Callable[[Reply], None],
        fail: Callable[[int, Exception], None],
        tell_failed: Callable[[int, Exception], None],
        draw: Callable[[int, Picture, Output], None],
        pulses: Pulses,
        space: SharedSlab,
    ) -> None:
        self._pulses, self._space = pulses, space
        self._loaded, self._send, self._fail, self._tell_failed, self._draw = loaded, send, fail, tell_failed, draw
        self._serving: dict[int, _Serving] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._timed: list[Timed] = []
        self._cache = SegmentCache()
        self._reader = Reader(
            loaded.model,
            loaded.tokenizer,
            loaded.planner,
            ContextBuilder(loaded.model, self._cache),
            max_num_seqs=max_num_seqs,
            max_model_len=loaded.max_model_len,
            on_write=lambda texts, seconds: self._timed.append(Timed("text", texts, seconds)),
            space=space,
        )

    @property
    def busy(self) -> bool:
        """Whether there is anything to read or write."""
        return self._reader.busy

    def work(self) -> list[Timed]:
        """One unit of reading and writing, if there is any; the step that wrote, if it did."""
        self._timed = []
        if self._reader.busy:
            try:
                self._reader.work()
            except Exception as error:  # of the reader as a whole: which request it was cannot be told
                self._reader.abandon(error)
        return self._timed

    def drop_cache(self) -> None:
        """Give back the memory of contexts that are only kept for other requests."""
        self._cache.clear()

    def forget(self, id_: int) -> None:
        """Drop a request; nothing if it is over, or drawn."""
        if (serving := self._serving.pop(id_, None)) is not None:
            for reading in serving.readings:
                self._reader.cancel(reading)

    def close(self) -> None:
        """Plan no more."""
        self._thread.shutdown(cancel_futures=True)

    def serve(self, command: Serve) -> None:
        """Plan a request in a thread: long texts and large images must not hold up the steps of others."""
        self._serving[command.id] = _Serving(command.output)
        self._thread.submit(self._plan_in_thread, command)

    def _plan_in_thread(self, command: Serve) -> None:
        serving = self._serving.get(command.id)
        if serving is None:
            return  # it has left
        try:
            with self._pulses.work():
                request = request_from_wire(common_pb2.Request.FromString(command.request), command.images)
                plan = plan_request(self._loaded.planner, request, self._loaded.max_model_len)
                self._check_room(plan)
                serving.plan = plan
            self._send(Planned(command.id))
        except Exception as error:
            self._tell_failed(command.id, error)

    def _check_room(self, plan: RequestPlan) -> None:
        """Refuse what can never find room for its K/V, before anything is computed."""
        model, needed = self._loaded.model, 0
        if plan.draws:
            rows, columns = grid(self._loaded.planner, plan.size)
            padded = padded_latents(rows * columns, model.device.type)
            chains = {chain.digest: chain.length for chain in plan.chains.values()}
            needed = self._space.needed([row_kv_tokens(length, padded) for length in chains.values()])
        if plan.writes:
            text = plan.chain.length + text_settings(plan.request).max_tokens
            needed = max(needed, self._space.needed([text]))
        check_kv_room(needed, self._space.size)

    def read(self, command: Read) -> None:
        """Begin to read a request whose plan is made."""
        serving = self._serving.get(command.id)
        if serving is None or serving.plan is None:
            return  # it has left
        plan = serving.plan
        chains = plan.chains if plan.draws else {BranchName.GEN: plan.chain}
        distinct: dict[tuple[bytes, bool], list[BranchName]] = {}
        for name, chain in chains.items():
            # The think text makes gen's context another one than that of a branch with the same prompt.
            distinct.setdefault((chain.digest, name is BranchName.GEN and plan.writes), []).append(name)
        serving.left = len(distinct)
        for (_, writes), names in distinct.items():
            serving.readings.append(self._reading(command.id, serving, plan, names, writes=writes))
        for reading in serving.readings:
            self._reader.add(reading)

    def _reading(
        self, id_: int, serving: _Serving, plan: RequestPlan, names: list[BranchName], *, writes: bool
    ) -> Reading:
        def done(read: Written) -> None:
            serving.contexts |= dict.fromkeys(names, read.context)
            serving.left -= 1
            if writes:
                if not plan.draws:
                    self._tell_prefill(id_, serving)
                counts = _counts(plan, len(read.token_ids))
                self._send(TextDone(id_, read.text, read.token_ids, counts))
            if not serving.left:
                self._all_read(id_, serving, plan)

        def on_text(text: str) -> None:
            if not plan.draws:  # an answer's prompt is read when its first text comes
                self._tell_prefill(id_, serving)
            self._send(Text(id_, text, think=plan.draws))

        reading = Reading(
            plan.chains[names[0]] if plan.draws else plan.chain,
            plan.request.seed,
            on_done=done,
            on_error=lambda error: self._fail(id_, error),
            settings=text_settings(plan.request) if writes else None,
            append=plan.draws and writes,
            on_read=lambda: self._send(PromptRead(id_)),
            on_text=on_text,
        )
        reading.on_kv = lambda segment, *_: reading.computed.update({segment.digest: segment.length})
        return reading

    def _tell_prefill(self, id_: int, serving: _Serving) -> None:
        """Tell once that the contexts are computed."""
        if serving.told_prefill:
            return
        serving.told_prefill = True
        computed = sum(sum(reading.computed.values()) for reading in serving.readings)
        chains = [context.chain for context in serving.contexts.values()] or [each.chain for each in serving.readings]
        segments = {segment.digest: segment.length for chain in chains for segment in chain.segments}
        self._send(Prefilled(id_, sum(segments.values()), computed))

    def _all_read(self, id_: int, serving: _Serving, plan: RequestPlan) -> None:
        """Text answers are over; pictures are drawn from now on."""
        del self._serving[id_]
        self._tell_prefill(id_, serving)
        if not plan.draws:
            self._send(Done(id_))
            return
        if not plan.writes:
            self._send(TextDone(id_, "", (), _counts(plan, 0)))
        self._draw(id_, plan_picture(self._loaded.planner, plan, serving.contexts), serving.output)


def _counts(plan: RequestPlan, tokens: int) -> dict[str, int]:
    """What a request used, as fields of bagel.v1.Usage; branches that are equal count once."""
    images = sum(segment.length for segment in plan.chain.segments if segment.image is not None)
    kind = "think_tokens" if plan.draws else "completion_tokens"
    return {"prompt_tokens": plan.chain.length - images, "image_tokens": images, kind: tokens}
