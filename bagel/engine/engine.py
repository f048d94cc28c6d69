"""The whole of BAGEL in one process: contexts, text and pictures of a batch of requests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import check_positions, padded_latents, position_limit
from bagel.checkpoint.roles import Role
from bagel.engine.clock import WindowClock
from bagel.engine.context import Context, ContextBuilder, SegmentCache
from bagel.engine.plan import RequestPlan, grid, plan_picture, plan_request
from bagel.engine.sampler import Canvas, Picture, StepGate, decode_picture
from bagel.engine.segments import ChainPlanner
from bagel.engine.text import TextDecoder, TextRun
from bagel.errors import InvalidRequest, NotFinite
from bagel.events import OnEvent, Result, StepDone, TextDelta
from bagel.kv.digests import fingerprint
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_image
from bagel.model.threads import settle_threads
from bagel.model.tokenizer import BagelTokenizer, TextStream
from bagel.model.weights import load_model
from bagel.prompts import BranchName
from bagel.request import Request, text_settings
from bagel.telemetry.stages import stages_before

TOKEN_BUDGET = 24_576
"""Latent tokens over all branches that one step packs: two pictures of 1024 x 1024 with three branches."""
SLAB_BUDGET = 131_072
"""Tokens of K/V, contexts and latents, that one pack of pictures holds: 7 GiB of the 7B in bfloat16."""
DEFAULT_MAX_NUM_SEQS = 16


@dataclass
class _Job:
    """One request on its way."""

    index: int
    plan: RequestPlan
    contexts: dict[BranchName, Context] = field(default_factory=dict)
    run: TextRun | None = None
    timings: dict[str, float] = field(default_factory=dict)
    windows: WindowClock | None = None
    """Of a picture that is profiled."""

    @property
    def request(self) -> Request:
        return self.plan.request


class BagelEngine:
    """Serves batches of requests on one model of role full; see `load`.

    Results do not depend on how requests are batched, beyond rounding.
    """

    def __init__(
        self,
        model: Bagel,
        tokenizer: BagelTokenizer,
        model_fingerprint: bytes,
        *,
        cache: SegmentCache | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        profile: bool = False,
    ) -> None:
        """max_num_seqs: requests in one batch of text or pictures; max_model_len: positions of prompt and text.

        profile: results have the durations of the diffusion stages.
        """
        kv_dtype = str(model.dtype).removeprefix("torch.")
        self.model, self.tokenizer = model, tokenizer
        self.planner = ChainPlanner(model.config, tokenizer, fingerprint(model_fingerprint, kv_dtype))
        self.contexts = ContextBuilder(model, cache)
        self.texts = TextDecoder(model, tokenizer)
        self._profiles = profile
        self.max_num_seqs = max_num_seqs or DEFAULT_MAX_NUM_SEQS
        self.max_model_len = position_limit(model.config, max_model_len)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vae_use_tiling: bool = False,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        profile: bool = False,
    ) -> BagelEngine:
        """The engine of a checkpoint; raises CheckpointError if its files do not fit.

        vae_use_tiling decodes large pictures in overlapping tiles: less memory, not exactly the same picture.
        """
        with checkpoint.loading():
            tokenizer = BagelTokenizer(checkpoint.folder)
            delimiters = (tokenizer.image_start, tokenizer.image_end)
            model = load_model(checkpoint, Role.FULL, delimiter_ids=delimiters, dtype=dtype, device=device)
        settle_threads(model.config, device)
        if vae_use_tiling:
            model.autoencoder().use_tiling()
        return cls(
            model,
            tokenizer,
            checkpoint.fingerprint,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            profile=profile,
        )

    def generate(self, requests: Sequence[Request], on_event: OnEvent | None = None) -> list[Result]:
        """Serve requests together; results in their order, each also an event as soon as it is there.

        Raises InvalidRequest or InvalidImage before anything is computed if one of them cannot be served, and
        NotFinite, after all others are served, if a picture overflowed.
        """
        emit = on_event or (lambda event: None)
        jobs = [_Job(index, self._planned(index, request)) for index, request in enumerate(requests)]
        for job in jobs:
            with self._timed([job], "context"):
                self._build(job)
        speaking = [job for job in jobs if job.run is not None]
        for at in range(0, len(speaking), self.max_num_seqs):
            self._decode_texts(speaking[at : at + self.max_num_seqs], emit)
        results = [self._answer(job, emit) for job in jobs if not job.plan.draws]
        overflown: list[NotFinite] = []
        for group, padded in self._packs([job for job in jobs if job.plan.draws]):
            results += self._draw(group, padded, emit, overflown)
        if overflown:
            raise overflown[0]
        return sorted(results, key=lambda result: result.index)

    def _planned(self, index: int, request: Request) -> RequestPlan:
        try:
            return plan_request(self.planner, request, self.max_model_len)
        except InvalidRequest as error:
            error.index = index
            raise

    def _build(self, job: _Job) -> None:
        """Compute the contexts that the request's text, or its picture without one, goes on from."""
        if job.plan.writes:
            prompt = self.contexts.build(job.plan.chain)
            job.run = TextRun(prompt, text_settings(job.request), job.request.seed)
        for name, chain in job.plan.chains.items():
            if name is not BranchName.GEN or not job.run:
                job.contexts[name] = self.contexts.build(chain)

    def _decode_texts(self, jobs: Sequence[_Job], emit: OnEvent) -> None:
        """Decode replies and think texts; a think text then becomes the last segment of gen."""
        streams = [TextStream(self.tokenizer) for _ in jobs]

        def show(at: int, text: str) -> None:
            if text:
                emit(TextDelta(jobs[at].index, text, think=jobs[at].plan.draws))

        with self._timed(jobs, "text"):
            runs = [job.run for job in jobs if job.run is not None]
            self.texts.decode(runs, lambda at, token: show(at, streams[at].push(token)))
            for at, stream in enumerate(streams):
                show(at, stream.end())
        for job in jobs:
            if job.plan.draws and job.run is not None:
                with self._timed([job], "context"):
                    chain = self.planner.append_text(job.plan.chain, self.texts.reply(job.run))
                    check_positions(chain.rope, 0, self.max_model_len)
                    job.contexts[BranchName.GEN] = self.contexts.build(chain)

    def _packs(self, jobs: Sequence[_Job]) -> Iterator[tuple[list[_Job], int]]:
        """Groups of pictures that are drawn together: one bucket of latents, within the limits."""
        groups: dict[int, list[list[_Job]]] = {}
        for job in jobs:
            padded = self._bucket(job)
            packs = groups.setdefault(padded, [[]])
            together = [context for other in (*packs[-1], job) for context in other.contexts.values()]
            held = sum(context.length + padded for context in together)
            full = len(together) * padded > TOKEN_BUDGET or held > SLAB_BUDGET or len(packs[-1]) == self.max_num_seqs
            if packs[-1] and full:
                packs.append([])
            packs[-1].append(job)
        for padded, packs in groups.items():
            for pack in packs:
                yield pack, padded

    def _bucket(self, job: _Job) -> int:
        """Latents a row is padded to."""
        rows, columns = grid(self.planner, job.plan.size)
        return padded_latents(rows * columns, self.model.device.type)

    def _draw(self, jobs: Sequence[_Job], padded: int, emit: OnEvent, overflown: list[NotFinite]) -> list[Result]:
        """Denoise a pack together; each picture is decoded and given out as soon as its last step is done."""
        canvas = Canvas(self.model, [self._picture(job) for job in jobs], padded)
        gate = StepGate(self.model.device)
        results = []
        active = list(range(len(jobs)))
        while active:
            last = any(canvas.pictures[i].step + 1 == canvas.pictures[i].steps for i in active)
            with self._timed([jobs[i] for i in active], "denoise", settle=last):
                self._reach(jobs, canvas, active)
                with gate.step(len(active)):
                    canvas.step(active)
            for i in active:
                emit(StepDone(jobs[i].index, canvas.pictures[i].step, canvas.pictures[i].steps))
            finished = [i for i in active if canvas.pictures[i].finished]
            self._reach(jobs, canvas, finished)
            for i in finished:
                try:
                    results.append(self._finish(jobs[i], canvas.latents(i), emit))
                except NotFinite as error:
                    overflown.append(error)
            active = [i for i in active if not canvas.pictures[i].finished]
        return results

    @staticmethod
    def _reach(jobs: Sequence[_Job], canvas: Canvas, numbers: Sequence[int]) -> None:
        """Tell the clocks of pictures how many of their steps are launched."""
        for i in numbers:
            if (windows := jobs[i].windows) is not None:
                windows.reach(canvas.pictures[i].step)

    def _picture(self, job: _Job) -> Picture:
        """The picture of a job whose contexts are built."""
        picture = plan_picture(self.planner, job.plan, job.contexts)
        if self._profiles:
            job.windows = WindowClock(self.model.device, picture.steps)
        job.contexts = {}  # the canvas has its own copy
        return picture

    def _finish(self, job: _Job, latents: torch.Tensor, emit: OnEvent) -> Result:
        with self._timed([job], "decode"):
            decoded = decode_picture(self.model, latents, grid(self.planner, job.plan.size))
            if not decoded.isfinite().all():
                raise NotFinite("the picture overflowed; use smaller cfg scales, a smaller timestep_shift or float32")
            image = to_image(decoded)
        tokens = tuple(job.run.tokens) if job.run else ()
        text = self.texts.reply(job.run) if job.run else ""
        result = Result(job.index, image, text, tokens, job.request.seed, job.timings, profile=_profile(job))
        emit(result)
        return result

    @contextmanager
    def _timed(self, jobs: Sequence[_Job], stage: str, *, settle: bool = True) -> Iterator[None]:
        """Add the block's duration in seconds to a stage of every job: what each waited for it.

        settle: wait for the device, so that the work launched here is not counted in the next stage.
        """
        start = time.perf_counter()
        yield
        if settle and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        for job in jobs:
            job.timings[stage] = job.timings.get(stage, 0.0) + time.perf_counter() - start

    def _answer(self, job: _Job, emit: OnEvent) -> Result:
        assert job.run is not None
        text = self.texts.reply(job.run)
        result = Result(job.index, None, text, tuple(job.run.tokens), job.request.seed, job.timings)
        emit(result)
        return result


def _profile(job: _Job) -> dict[str, float]:
    """Durations of the diffusion stages of a picture that is done; none unless it is profiled."""
    if job.windows is None:
        return {}
    return stages_before(job.timings) | job.windows.stages() | {"decode": job.timings["decode"]}
