"""The vLLM engine turns readings into vLLM requests, steps them in its thread and exports their K/V to the store."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from PIL.Image import Image

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import check_positions
from bagel.engine.loading import kv_layout
from bagel.engine.segments import Chain, ChainPlanner
from bagel.engine.text import prompt_ids
from bagel.engine.text_scheduler import ChainExtended, ContextFailed, ContextRequest, PromptComputed, TextWritten
from bagel.errors import (
    BagelError,
    Draining,
    IncompleteContext,
    InvalidRequest,
    NotFinite,
    NotSupported,
    RunnerDied,
)
from bagel.kv.digests import SegmentKind, fingerprint
from bagel.kv.store import KvStore
from bagel.model.tokenizer import BagelTokenizer, TextStream
from bagel.rpc.convert import model_info
from bagel.telemetry.logs import Log
from bagel.telemetry.metrics import count_step
from bagel_thinker.engine import died, internal_error
from bagel_thinker.vllm.choice import choice
from bagel_thinker.vllm.claims import Claims
from bagel_thinker.vllm.core import Core, cached_tokens
from bagel_thinker.vllm.jobs import Filling, Job, Request
from bagel_thinker.vllm.requests import Placeholders, segment_starts
from bagel_thinker.vllm.settings import VllmSettings, row_limit
from bagel_thinker.vllm.sink import Notice, Sink
from bagel_thinker.watchdog import Pulse

MOST_FAILURES = 2
"""Consecutive steps that may fail before the engine gives up."""

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
        """Load a checkpoint; settings must name the device and the type. Raises ConfigError for what vLLM refuses."""
        config = checkpoint.config
        self.tokenizer = BagelTokenizer(checkpoint.folder)
        kv_fingerprint = fingerprint(checkpoint.fingerprint, settings.dtype)
        self.planner = ChainPlanner(config, self.tokenizer, settings.segments_fingerprint(checkpoint.fingerprint))
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
        self._claims = Claims(self.store)
        self._sink = Sink(self.store.arena, self.store.layout, self._on_notice)
        started: Future[None] = Future()
        make = partial(self._make_core, checkpoint)
        self._thread = threading.Thread(target=self._run, args=(make, started), name="vllm-engine", daemon=True)
        self._thread.start()
        started.result()
        try:  # a file that changed while vLLM read it would not be the model that the fingerprint names
            checkpoint.check_unchanged()
        except BaseException:
            self.close()
            raise

    def encode_ahead(self, image: Image) -> None:
        """None: vLLM's workers encode the images of a request that they compute."""

    def submit(self, reading: ContextRequest) -> None:
        """Start a request; it emits its events on the engine's thread."""
        self._commands.put(lambda: self._take(reading))

    def cancel(self, reading: ContextRequest) -> None:
        """Drop a reading."""
        self._commands.put(lambda: self._cancel(reading))

    def close(self) -> None:
        """Stop after the current step."""
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
        """Run the waiting commands; blocks while there is nothing to compute. Returns False on the command to stop."""
        while True:
            if idle := self.failed.done() or not self._core.busy:
                self.pulse.rest()  # an idle engine must not look like a hanging one
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
            self._has_overflowed()  # reads the count now, even for an abandoned text: the next step must not inherit it
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is not None:
                self._advance(request, output)
        self._admit()

    def _writes(self, name: str) -> bool:
        """Whether the request with this name is still wanted and writes text."""
        request = self._requests.get(name)
        return request is not None and request.job is not None and request.job.writes

    # Readings

    def _take(self, reading: ContextRequest) -> None:
        if self.failed.done():
            reading.emit(ContextFailed(died()))
            return
        job = Job(reading, reading.chain, TextStream(self.tokenizer))
        try:
            self._check(job)
        except BagelError as error:
            reading.emit(ContextFailed(error))
            return
        self._waiting.append(job)
        self._admit()

    def _check(self, job: Job) -> None:
        """Refuse a job that this engine cannot compute."""
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
                "this Thinker has the role understand and reads no images to edit; send the request to one of the role "
                "context"
            )

    def _cancel(self, reading: ContextRequest) -> None:
        self._waiting = [job for job in self._waiting if job.reading is not reading]
        for request in list(self._requests.values()):
            if request.job is not None and request.job.reading is reading:
                self._abandon(request)

    def _admit(self) -> None:
        """Start the waiting jobs, except those that share a segment with a request which is still computing it."""
        for job in list(self._waiting):
            if self._claims.blocks(job.chain):  # once it is computed, this job finds it in vLLM's cache
                continue
            self._waiting.remove(job)
            try:
                self._start(job)
            except Exception as error:
                log.error("a reading could not be started", error=repr(error))
                job.reading.emit(ContextFailed(error))

    def _start(self, job: Job) -> None:
        segments = job.chain.segments
        if not job.writes and all(self.store.is_complete(segment.digest) for segment in segments):
            self._done(job)
            return
        request = self._claims.take(f"r{next(self._names)}", job)
        self._requests[request.name] = request
        try:
            self._core.add(request.name, job.chain, **self._arguments(job, request.fillings))
        except BaseException:
            self._end(request)
            raise

    def _arguments(self, job: Job, fillings: dict[bytes, Filling]) -> dict[str, Any]:
        """The arguments of `Core.add` beside the chain."""
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
            "stops": job.stops(self.tokenizer),
        }

    # Outputs

    def _advance(self, request: Request, output: Any) -> None:
        """Process the output that a step has for a request."""
        job = request.job
        if not request.begun:  # its first token shows that the whole prompt is computed
            request.begun = True
            self._computed(request, output)
        if job is not None and job.writes:
            if self._ids.overflow in output.new_token_ids and self._has_overflowed():
                self._fail(request, NotFinite("the text overflowed: its logits are not finite; use float32"))
                return
            job.take(output.new_token_ids, self.tokenizer)
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

    def _has_overflowed(self) -> bool:
        """Whether logits of this step were not finite. The overflow id alone proves nothing: it may be sampled."""
        if self._overflowed is None:
            before, self._overflows = self._overflows, self._core.overflows()
            self._overflowed = self._overflows > before
        return self._overflowed

    def _computed(self, request: Request, output: Any) -> None:
        """The K/V of the prompt are computed."""
        if request.job is not None:
            request.count(request.job, cached_tokens(output), self._core.block_size)
            if request.job.writes:
                request.job.reading.emit(PromptComputed(dict(request.job.reading.computed)))
        self._claims.computed(request)

    def _text_done(self, request: Request, job: Job) -> None:
        if text := job.stream.end():
            job.reading.emit(TextWritten(text, len(job.tokens)))
        job.written = True
        self._finish(request)

    def _finish(self, request: Request) -> None:
        """Continue a reading once its request has ended and all its K/V are in the store."""
        job = request.job
        if job is None or not request.over or not request.filled(self._marks):
            return
        request.job = None
        if job.reading.append and job.written and job.chain is job.reading.chain:
            self._append(job)
        else:
            self._done(job)

    def _append(self, job: Job) -> None:
        """Append the text to the context as its last segment, which another request then computes."""
        try:
            job.chain = self.planner.append_text(job.chain, job.reply(self.tokenizer))
            check_positions(job.chain.rope, 0, self._settings.max_model_len)
            self._check_rows(job.chain)
            job.reading.emit(ChainExtended(job.chain))
        except Exception as error:
            job.reading.emit(ContextFailed(error))
            return
        self._waiting.append(job)

    def _check_rows(self, chain: Chain) -> None:
        if chain.length >= self._rows:
            raise InvalidRequest(
                "prompt", f"with the think text the context has {chain.length} tokens; this Thinker holds {self._rows}"
            )

    def _done(self, job: Job) -> None:
        job.reading.emit(job.result(self.tokenizer))

    # Exports

    def _on_notice(self, notice: Notice) -> None:
        """Receive a worker's notice, in any thread."""
        error: BagelError | None = None
        if notice.digest:  # marked at once, so that pages leave without waiting for the engine's step to end
            error = self._claims.mark(self._requests.get(notice.request), notice, self._settings.tensor_parallel_size)
        self._commands.put(lambda: self._handle(notice, error))

    def _handle(self, notice: Notice, error: BagelError | None) -> None:
        """Handle a notice in the engine's thread. error: the result of `Claims.mark`."""
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
            self._claims.exported(request, self._marks)
            self._finish(request)
            self._admit()

    def _over(self, request: Request, rank: int) -> None:
        """A rank has finished its copies for a request."""
        request.ended_ranks.add(rank)
        if len(request.ended_ranks) < self._settings.tensor_parallel_size:
            return  # the others may still write, so the segments' memory must not be reused yet
        job = request.job
        if job is not None and request.over and not request.filled(self._marks):
            self._fail(request, IncompleteContext("vLLM ended the request before all its K/V were copied; try again"))
        if request.job is None:
            self._end(request)
        self._admit()

    def _end(self, request: Request) -> None:
        """Release everything that a request held."""
        self._requests.pop(request.name, None)
        self._claims.release(request)

    # Failures

    def _abandon(self, request: Request) -> None:
        """Abort a request whose result is no longer wanted; it ends when every rank has finished its copies."""
        request.job = None
        if not request.over:
            request.over = True
            self._core.abort([request.name])

    def _fail(self, request: Request, error: Exception) -> None:
        job = request.job
        self._abandon(request)
        if job is not None:
            job.reading.emit(ContextFailed(error))

    def _fail_all(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            job.reading.emit(ContextFailed(error))
        for request in list(self._requests.values()):
            self._fail(request, error)

    def _recover(self, error: Exception) -> None:
        """Recover from a failed step: fail every request, since any may be the cause, and drop vLLM's caches."""
        log.error("the engine failed", exc_info=True)
        self._failures += 1
        self._fail_all(internal_error(error))
        self._claims.forget()
        if self._failures <= MOST_FAILURES and not self._broken.is_set() and self._core.forget():
            log.warning("the engine goes on")
        elif not self.failed.done():
            log.error("the engine cannot go on")
            self.failed.set_exception(died())

    def _break(self) -> None:
        """React to the death of a worker process, in another thread; the engine may be idle and needs the command."""
        self._broken.set()
        self._commands.put(lambda: self._recover(died()))
