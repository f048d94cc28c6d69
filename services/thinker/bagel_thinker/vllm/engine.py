"""The vLLM engine: readings as vLLM requests, stepped in a thread of its own, their K/V exported to the store."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import check_positions
from bagel.engine.loading import kv_layout
from bagel.engine.segments import Chain, ChainPlanner
from bagel.engine.text import prompt_ids
from bagel.engine.text_scheduler import Reading
from bagel.errors import (
    BagelError,
    Draining,
    EngineDied,
    IncompleteContext,
    InvalidRequest,
    NotFinite,
    NotSupported,
    RunnerDied,
    UnknownSegment,
)
from bagel.kv.digests import SegmentKind, fingerprint
from bagel.kv.store import KvStore
from bagel.model.tokenizer import BagelTokenizer, TextStream
from bagel.request import TextSettings
from bagel.rpc.convert import model_info
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import count_step
from bagel_thinker.vllm.choice import choice
from bagel_thinker.vllm.core import Core, cached_tokens
from bagel_thinker.vllm.jobs import Filling, Job, Request
from bagel_thinker.vllm.requests import Placeholders, segment_starts
from bagel_thinker.vllm.settings import VllmSettings, row_limit
from bagel_thinker.vllm.sink import Notice, Sink
from bagel_thinker.watchdog import Pulse

MOST_FAILURES = 2
"""Steps in a row that may fail before the engine is given up."""
KNOWN_SEGMENTS = 65_536
"""Digests remembered as computed before, so that who shares them need not wait for one another."""

log = Log("bagel.thinker")


class VllmEngine:
    """vLLM behind the Engine protocol."""

    name = "vllm"

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: VllmSettings,
        *,
        model_name: str,
        kv_store_bytes: int,
    ) -> None:
        """Load a checkpoint; settings name device and type outright. Raises ConfigError for what vLLM refuses."""
        config = checkpoint.config
        self.tokenizer = BagelTokenizer(checkpoint.folder)
        kv_fingerprint = fingerprint(checkpoint.fingerprint, settings.dtype)
        self.planner = ChainPlanner(config, self.tokenizer, kv_fingerprint)
        self.store = KvStore(kv_layout(checkpoint, settings.dtype), kv_fingerprint, kv_store_bytes)
        self.info = model_info(
            config,
            name=model_name,
            checkpoint_fingerprint=checkpoint.fingerprint,
            kv_fingerprint=kv_fingerprint,
            max_positions=settings.max_model_len,
            dtype=settings.dtype,
            device=settings.device,
        )
        self.failed: Future[None] = Future()
        self.pulse = Pulse()
        self._failures, self._broken = 0, threading.Event()
        self._overflows = 0
        self._overflowed: bool | None = None
        self._ids = Placeholders.of(self.tokenizer, config.llm.vocab_size)
        self._settings, self._rows = settings, row_limit(config, settings)
        self._marks = self.store.layout.layers * settings.tensor_parallel_size
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._names = itertools.count()
        self._waiting: list[Job] = []
        self._requests: dict[str, Request] = {}
        self._busy: dict[bytes, Request] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._sink = Sink(self.store.arena, self.store.layout, self._hear)
        started: Future[None] = Future()
        make = partial(self._make_core, checkpoint)
        self._thread = threading.Thread(target=self._run, args=(make, started), name="vllm-engine", daemon=True)
        self._thread.start()
        started.result()
        try:
            checkpoint.check_unchanged()
        except BaseException:
            self.close()
            raise

    def submit(self, reading: Reading) -> None:
        """Take a reading on."""
        self._commands.put(lambda: self._take(reading))

    def cancel(self, reading: Reading) -> None:
        """Drop a reading."""
        self._commands.put(lambda: self._cancel(reading))

    def close(self) -> None:
        """Stop after the step under way."""
        self._commands.put(None)
        self._thread.join()

    # The thread

    def _make_core(self, checkpoint: Checkpoint) -> Core:
        sink = self._sink.open(other_processes=self._settings.tensor_parallel_size > 1)
        return Core(checkpoint.config, self._settings, self._ids, checkpoint.folder, sink, self._break)

    def _run(self, make: Callable[[], Core], started: Future[None]) -> None:
        try:
            self._core = make()
        except BaseException as error:
            self._sink.close()
            started.set_exception(error)
            return
        started.set_result(None)
        while True:
            try:
                while self._take_commands():
                    if self._core.busy and not self.failed.done():
                        self._step()
                break
            except Exception as error:
                self._recover(error)
        self._fail_all(Draining("the Thinker has shut down; send the request again"))
        self._core.close()
        self._sink.close()

    def _take_commands(self) -> bool:
        """Run what waits; blocks while there is nothing else to do. False: stop."""
        while True:
            if idle := self.failed.done() or not self._core.busy:
                self.pulse.rest()
            try:
                command = self._commands.get(block=idle)
            except Empty:
                return True
            self.pulse.beat()
            if command is None:
                return False
            command()

    def _step(self) -> None:
        self.pulse.beat()
        began = time.perf_counter()
        outputs = self._core.step()
        writing = sum(self._writes(output.request_id) for output in outputs)
        if writing:
            count_step("text", writing, time.perf_counter() - began)
        self._failures, self._overflowed = 0, None
        if any(self._ids.overflow in output.new_token_ids for output in outputs):
            self._overflown()  # counted with this step, whether or not anybody still waits for the text
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is not None:
                self._advance(request, output)
        self._admit()

    def _writes(self, name: str) -> bool:
        """Whether a request that is under way writes text."""
        request = self._requests.get(name)
        return request is not None and request.job is not None and request.job.writes

    # Readings

    def _take(self, reading: Reading) -> None:
        if self.failed.done():
            reading.on_error(_died())
            return
        job = Job(reading, reading.chain, TextStream(self.tokenizer))
        try:
            self._check(job)
        except BagelError as error:
            reading.on_error(error)
            return
        self._waiting.append(job)
        self._admit()

    def _check(self, job: Job) -> None:
        """Refuse what cannot be computed here."""
        written = job.reading.settings.max_tokens + 1 if job.reading.settings else 0
        if job.chain.length + written > self._rows:
            raise InvalidRequest(
                "prompt",
                f"the prompt has {job.chain.length} tokens, those of its images included, and up to {written} may "
                f"follow; this Thinker holds {self._rows}: send fewer or smaller images, or start it with a larger "
                "max_model_len",
            )
        generates = any(segment.kind is SegmentKind.VAE for segment in job.chain.segments)
        if generates and not self._settings.role.parts.generation:
            raise NotSupported(
                "this Thinker was started with --role understand and reads no images to edit; send the request to one "
                "of --role context"
            )

    def _cancel(self, reading: Reading) -> None:
        self._waiting = [job for job in self._waiting if job.reading is not reading]
        for request in list(self._requests.values()):
            if request.job is not None and request.job.reading is reading:
                self._abandon(request)

    def _admit(self) -> None:
        """Start what waits for nobody: of readings with a segment in common, one computes it, the others find it."""
        for job in list(self._waiting):
            if any(segment.digest in self._busy for segment in job.chain.segments):
                continue
            self._waiting.remove(job)
            try:
                self._start(job)
            except Exception as error:
                log.error("a reading could not be started", error=repr(error))
                job.reading.on_error(error)

    def _start(self, job: Job) -> None:
        segments = job.chain.segments
        if not job.writes and all(self.store.is_complete(segment.digest) for segment in segments):
            self._done(job)
            return
        name = f"r{next(self._names)}"
        fillings = {each.digest: Filling(each.digest) for each in segments if self._claim(each.digest)}
        fresh = frozenset(each.digest for each in segments) - self._known.keys()
        request = job.request = Request(name, job, fresh, fillings)
        for digest in fresh | fillings.keys():
            self._busy[digest] = request
        self._requests[name] = request
        try:
            self._core.add(name, job.chain, **self._arguments(job, fillings))
        except BaseException:
            self._end(request)
            raise

    def _arguments(self, job: Job, fillings: dict[bytes, Filling]) -> dict[str, Any]:
        """What vLLM is told beside the chain."""
        rows = zip(job.chain.segments, segment_starts(job.chain), strict=True)
        exports = [
            (segment.digest.hex(), start, segment.length, self.store.offsets(segment.digest, 0)[0])
            for segment, start in rows
            if segment.digest in fillings
        ]
        extra: dict[str, Any] = {"kv_transfer_params": {"exports": exports}}
        settings = job.reading.settings
        if not job.writes or settings is None:
            return {"extra": extra}
        extra |= choice(settings, job.reading.seed, prompt_ids(job.chain))
        return {
            "extra": extra,
            "then": [self.tokenizer.bos],
            "max_tokens": settings.max_tokens,
            "stops": self._stops(settings),
        }

    def _stops(self, settings: TextSettings) -> list[int]:
        return [self.tokenizer.eos, *settings.stop_token_ids]

    def _claim(self, digest: bytes) -> bool:
        """Claim and pin a segment that a lease has reserved and nobody has filled."""
        try:
            if not self.store.claim(digest):
                return False
            self.store.pin(digest)
        except UnknownSegment:
            return False
        return True

    # Outputs

    def _advance(self, request: Request, output: Any) -> None:
        """Take in what a step gave a request."""
        job = request.job
        if not request.begun:
            request.begun = True
            self._computed(request, output)
        if job is not None and job.writes:
            if self._ids.overflow in output.new_token_ids and self._overflown():
                self._fail(request, NotFinite("the text overflowed: its logits are not finite; use float32"))
                return
            self._show(job, output.new_token_ids)
        if output.finish_reason is None:
            return
        request.over = True
        if job is None:
            return
        if str(output.finish_reason) not in ("stop", "length"):
            self._fail(request, RunnerDied(f"vLLM ended the request with {output.finish_reason}; send it again"))
        elif job.writes:
            self._text_done(request, job)
        else:
            self._finish(request)

    def _overflown(self) -> bool:
        """Whether logits of this step were not finite; the id that stands for it may also have been sampled."""
        if self._overflowed is None:
            before, self._overflows = self._overflows, self._core.overflows()
            self._overflowed = self._overflows > before
        return self._overflowed

    def _computed(self, request: Request, output: Any) -> None:
        """The prompt's K/V are there: who waited for its segments finds them in vLLM's cache."""
        if request.job is not None:
            _count(request, request.job, cached_tokens(output), self._core.block_size)
            if request.job.writes:
                request.job.reading.on_read()
        for digest in request.fresh:
            self._known[digest] = None
            if digest not in request.fillings:
                self._busy.pop(digest, None)
        request.fresh = frozenset()
        while len(self._known) > KNOWN_SEGMENTS:
            self._known.popitem(last=False)

    def _show(self, job: Job, tokens: list[int]) -> None:
        assert job.reading.settings is not None
        stops = self._stops(job.reading.settings)
        for token in tokens:
            if token in stops:
                continue
            job.tokens.append(token)
            if text := job.stream.push(token):
                job.reading.on_text(text)

    def _text_done(self, request: Request, job: Job) -> None:
        if text := job.stream.end():
            job.reading.on_text(text)
        job.written = True
        self._finish(request)

    def _finish(self, request: Request) -> None:
        """Go on with a reading once its request has ended and all its K/V are in the store."""
        job = request.job
        if job is None or not request.over or not request.filled(self._marks):
            return
        request.job = None
        if job.reading.append and job.written and job.chain is job.reading.chain:
            self._append(job)
        else:
            self._done(job)

    def _append(self, job: Job) -> None:
        """The text becomes the last segment of the context."""
        try:
            job.chain = self.planner.append_text(job.chain, job.reply(self.tokenizer))
            check_positions(job.chain.rope, 0, self._settings.max_model_len)
            self._check_rows(job.chain)
            job.reading.on_chain(job.chain)
        except Exception as error:
            job.reading.on_error(error)
            return
        self._waiting.append(job)

    def _check_rows(self, chain: Chain) -> None:
        if chain.length >= self._rows:
            raise InvalidRequest(
                "prompt", f"with the think text the context has {chain.length} tokens; this Thinker holds {self._rows}"
            )

    def _done(self, job: Job) -> None:
        job.reading.on_done(job.result(self.tokenizer))

    # Exports

    def _hear(self, notice: Notice) -> None:
        """A worker's notice, in whichever thread: pages are given out at once, the rest is the engine's."""
        error: BagelError | None = None
        if notice.digest:
            error = self._mark(notice)
        self._commands.put(lambda: self._heed(notice, error))

    def _mark(self, notice: Notice) -> BagelError | None:
        request = self._requests.get(notice.request)
        filling = request.fillings.get(bytes.fromhex(notice.digest)) if request else None
        if request is None or filling is None:
            return None
        filling.told.add((notice.layer, notice.rank))
        ranks = sum((notice.layer, rank) in filling.told for rank in range(self._settings.tensor_parallel_size))
        if ranks < self._settings.tensor_parallel_size:
            return None
        if (job := request.job) is not None:
            job.reading.kv_times.append(time.monotonic())
        try:
            self.store.mark_layer(filling.digest, notice.layer)
        except UnknownSegment as gone:
            return gone
        return None

    def _heed(self, notice: Notice, error: BagelError | None) -> None:
        request = self._requests.get(notice.request)
        if request is None:
            return
        if notice.over:
            self._over(request, notice.rank)
        elif notice.failure:
            self._fail(request, IncompleteContext(f"{notice.failure}; send the request again"))
        elif error is not None:
            self._fail(request, error)
        else:
            self._release_filled(request)
            self._finish(request)
            self._admit()

    def _release_filled(self, request: Request) -> None:
        """Segments that are complete hold nobody up."""
        for digest, filling in request.fillings.items():
            if len(filling.told) == self._marks and digest not in request.fresh:
                self._busy.pop(digest, None)

    def _over(self, request: Request, rank: int) -> None:
        """A worker writes for a request no more. Its memory may be another's only when none does."""
        request.quiet.add(rank)
        if len(request.quiet) < self._settings.tensor_parallel_size:
            return
        job = request.job
        if job is not None and request.over and not request.filled(self._marks):
            self._fail(request, IncompleteContext("vLLM ended the request before all its K/V were copied; try again"))
        if request.job is None:
            self._end(request)
        self._admit()

    def _end(self, request: Request) -> None:
        """Let go of all that a request held."""
        self._requests.pop(request.name, None)
        for digest in (*request.fresh, *request.fillings):
            if self._busy.get(digest) is request:
                del self._busy[digest]
        for digest in request.fillings:
            self.store.unclaim(digest)
            self.store.unpin(digest)

    # Failures

    def _abandon(self, request: Request) -> None:
        """Nobody wants a request any more; it is over when its worker says so."""
        request.job = None
        if not request.over:
            request.over = True
            self._core.abort([request.name])

    def _fail(self, request: Request, error: Exception) -> None:
        job = request.job
        self._abandon(request)
        if job is not None:
            job.reading.on_error(error)

    def _fail_all(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            job.reading.on_error(error)
        for request in list(self._requests.values()):
            self._fail(request, error)

    def _recover(self, error: Exception) -> None:
        """A step failed: whose fault it was cannot be told, and what vLLM has cached may be wrong."""
        log.error("the engine failed", exc_info=True)
        self._failures += 1
        self._fail_all(
            BagelError(f"internal error of the engine: {type(error).__name__}; the log of this service has the details")
        )
        self._known.clear()
        if self._failures <= MOST_FAILURES and not self._broken.is_set() and self._core.forget():
            log.warning("the engine goes on")
        elif not self.failed.done():
            log.error("the engine cannot go on")
            self.failed.set_exception(_died())

    def _break(self) -> None:
        """A worker process has died; told from another thread, perhaps while nothing runs."""
        self._broken.set()
        self._commands.put(lambda: self._recover(_died()))


def _died() -> EngineDied:
    return EngineDied("the Thinker's engine cannot go on, and the service ends; its log has the details; try again")


def _count(request: Request, job: Job, cached: int, block: int) -> None:
    """Which tokens of a chain were computed: of new segments all, of others what vLLM's cache of `cached` had lost.

    vLLM keeps whole blocks; what it computes again of the last one is no loss.
    """
    at = 0
    for segment in job.chain.segments:
        end = at + segment.length
        if segment.digest in request.fresh:
            job.reading.computed[segment.digest] = segment.length
        elif cached < end // block * block - block:
            job.reading.computed.setdefault(segment.digest, min(segment.length, end - cached))
        at = end
