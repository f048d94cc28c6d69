"""The engine in this process: the same scheduler and engine as in the service, in a loop instead of behind a pipe.

A module that must not import torch imports this one by name, at run time. It calls `load` alone, whose values in and
out are plain or come from modules without torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.commands import Remove
from bagel.engine.engine import DEFAULT_MAX_NUM_SEQS, Engine
from bagel.engine.events import Begun, Done, Drawn, Event, Failed, Prefilled, PromptRead, StepTaken, Text, TextDone
from bagel.engine.loading import LoadedModel, load_role
from bagel.engine.memory import is_out_of_memory
from bagel.engine.plan import RequestPlan
from bagel.engine.scheduler import Scheduler
from bagel.engine.segments import ChainPlanner
from bagel.errors import BagelError, InvalidRequest, OutOfMemory
from bagel.events import OnEvent, Result, StepDone, TextDelta
from bagel.model.attention_backends import AUTO
from bagel.model.bagel import Bagel
from bagel.model.device import DTYPES, choose_device, choose_dtype
from bagel.model.tokenizer import BagelTokenizer
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.request import Request
from bagel.telemetry.stages import StageClock, stages_before

if TYPE_CHECKING:
    from bagel.deployment.schema import StageDeploy


@dataclass
class _Job:
    """One request on its way."""

    index: int
    plan: RequestPlan
    clock: StageClock = field(default_factory=StageClock)
    text: TextDone | None = None
    steps: int = 0
    drawn: bool = False
    """Whether its last step is taken, and the engine has room for another request."""

    def result(self, drawn: Drawn | None) -> Result:
        """What the request came to."""
        image, profile = None, {}
        if drawn is not None:
            assert isinstance(drawn.picture, Image)
            image, self.clock.timings["decode"] = drawn.picture, drawn.seconds
            if drawn.profile:
                profile = stages_before(self.clock.timings) | dict(drawn.profile)
        text, tokens = ("", ()) if self.text is None else (self.text.text, self.text.token_ids)
        return Result(self.index, image, text, tokens, self.plan.request.seed, self.clock.timings, profile=profile)


class BagelEngine:
    """Serves batches of requests on one model of role full; see `load`.

    Results do not depend on how requests are batched, beyond rounding. One call is served at a time; others wait.
    """

    def __init__(self, loaded: LoadedModel, *, max_num_seqs: int | None = None, profile: bool = False) -> None:
        """max_num_seqs: requests under way at once; profile: results have the durations of the diffusion stages."""
        self.loaded, self.max_num_seqs = loaded, max_num_seqs or DEFAULT_MAX_NUM_SEQS
        # A queue, as the VAE's thread emits too.
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._engine = Engine(loaded, self._events.put, max_num_seqs=self.max_num_seqs, profile=profile)
        self._ids, self._turn = count(), Lock()

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
        attention_backend: str = AUTO,
        enforce_eager: bool = False,
        quantization: str | None = None,
        cpu_offload: str | None = None,
        profile: bool = False,
        groups: Groups = UNDIVIDED,
    ) -> BagelEngine:
        """The engine of a checkpoint; raises CheckpointError if its files do not fit. Arguments as `load_role`'s.

        Of several ranks each has an engine, and all of them are called alike; the first one's results have pictures.
        """
        loaded = load_role(
            checkpoint,
            Role.FULL,
            dtype=dtype,
            device=torch.device(device),
            max_model_len=max_model_len,
            vae_use_tiling=vae_use_tiling,
            attention_backend=attention_backend,
            enforce_eager=enforce_eager,
            groups=groups,
            quantization=quantization,
            cpu_offload=cpu_offload,
        )
        return cls(loaded, max_num_seqs=max_num_seqs, profile=profile)

    @property
    def model(self) -> Bagel:
        return self.loaded.model

    @property
    def tokenizer(self) -> BagelTokenizer:
        return self.loaded.tokenizer

    @property
    def planner(self) -> ChainPlanner:
        return self.loaded.planner

    @property
    def fingerprint(self) -> bytes:
        """The checkpoint's."""
        return self.loaded.fingerprint

    @property
    def device(self) -> str:
        return str(self.loaded.model.device)

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    @property
    def segments_computed(self) -> int:
        """Segments of contexts that no cache had."""
        assert self._engine.single_stage is not None
        return self._engine.single_stage.segments_computed

    def generate(self, requests: Sequence[Request], on_event: OnEvent | None = None) -> list[Result]:
        """Serve requests together; results in their order, each also an event as soon as it is there.

        Raises InvalidRequest or InvalidImage before anything is computed if one of them cannot be served, and the
        first error of a request (as NotFinite if its picture overflowed) after all others are served.
        """
        device = self.loaded.model.device
        # A current device belongs to a thread, and this may not be the one that loaded.
        with self._turn, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            plans = [self._planned(index, request) for index, request in enumerate(requests)]
            return _Batch(self._engine, self._events, self.max_num_seqs, on_event).run(
                {next(self._ids): _Job(index, plan) for index, plan in enumerate(plans)}
            )

    def _planned(self, index: int, request: Request) -> RequestPlan:
        assert self._engine.single_stage is not None
        try:
            return self._engine.single_stage.plan(request)
        except InvalidRequest as error:
            error.index = index
            raise


class _Batch:
    """One call of `generate`: its requests through the engine."""

    def __init__(self, engine: Engine, events: SimpleQueue[Event], max_num_seqs: int, on_event: OnEvent | None) -> None:
        self._engine, self._events, self._max_num_seqs = engine, events, max_num_seqs
        self._report = on_event or (lambda event: None)
        self._scheduler = Scheduler()
        self._under_way: dict[int, _Job] = {}
        self._results: list[Result] = []
        self._errors: list[BagelError] = []
        while not events.empty():  # of a call that was interrupted
            events.get()

    def run(self, jobs: dict[int, _Job]) -> list[Result]:
        """Serve the requests, by their ids in the engine."""
        waiting = deque(jobs.items())
        try:
            while waiting or self._under_way:
                while waiting and self._computing < self._max_num_seqs:
                    self._begin(*waiting.popleft())
                if (plan := self._scheduler.plan()) is not None:
                    self._engine.execute(plan)
                # Blocks: with no step to take, the loop waits for the VAE's thread.
                self._observe(self._events.get())
                while not self._events.empty():
                    self._observe(self._events.get())
        finally:
            # Some are left if the call is interrupted; the engine serves the next call.
            for id_ in self._under_way:
                self._engine.execute(Remove(id_))
        if self._errors:
            raise self._errors[0].__cause__ or self._errors[0]  # a fault of ours keeps its traceback
        return sorted(self._results, key=lambda result: result.index)

    @property
    def _computing(self) -> int:
        """Requests that take part in the engine's work: the same on all ranks, of which the first alone decodes."""
        return sum(not job.drawn for job in self._under_way.values())

    def _begin(self, id_: int, job: _Job) -> None:
        assert self._engine.single_stage is not None
        self._under_way[id_] = job
        # Started again, as time spent waiting for a turn is not the request's own.
        job.clock = StageClock()
        self._engine.single_stage.add(id_, job.plan, None)

    def _observe(self, event: Event) -> None:
        self._scheduler.observe(event)
        if (job := self._under_way.get(getattr(event, "id", -1))) is not None:
            self._progress(job, event)

    def _progress(self, job: _Job, event: Event) -> None:
        match event:
            case PromptRead() | Prefilled():
                job.clock.lap("context")
            case Text():
                self._report(TextDelta(job.index, event.text, event.think))
            case TextDone():
                # A picture without think has an empty text, which took no time.
                if event.token_ids:
                    job.clock.lap("text")
                job.text = event
            case Begun():
                job.steps = event.steps
            case StepTaken():
                self._report(StepDone(job.index, event.step, job.steps))
                if event.step == job.steps:
                    job.clock.lap("denoise")
                    job.drawn = True
                    if self._engine.loaded.groups.world.index:
                        self._done(event.id, job.result(None))  # the first rank gives the picture out
            case Drawn() | Done():
                self._done(event.id, job.result(event if isinstance(event, Drawn) else None))
            case Failed():
                del self._under_way[event.id]
                self._scheduler.remove(event.id)
                self._engine.execute(Remove(event.id))
                self._errors.append(event.error)

    def _done(self, id_: int, result: Result) -> None:
        del self._under_way[id_]
        self._results.append(result)
        self._report(result)


def load(
    checkpoint: Checkpoint, stage: StageDeploy, *, device: str = "auto", dtype: str = "auto", profile: bool = False
) -> BagelEngine:
    """Load a model as the deploy file's stage says.

    device: auto, cpu, cuda (the stage's GPU) or cuda:N; dtype: auto, bfloat16 or float32; profile: as BagelEngine has
    it. Raises ConfigError if there is no such device, CheckpointError if the files do not fit, OutOfMemory if the
    device is too small.
    """
    place = choose_device(device, stage.device_ids[0])
    dtype = choose_dtype(dtype, place)
    with _memory_remedy("choose a device with more, or --dtype bfloat16"):
        return BagelEngine.load(
            checkpoint,
            dtype=DTYPES[dtype],
            device=place,
            vae_use_tiling=stage.tiling,
            max_num_seqs=stage.max_num_seqs,
            max_model_len=stage.max_model_len,
            attention_backend=stage.attention_backend or AUTO,
            enforce_eager=bool(stage.enforce_eager),
            quantization=stage.quantization,
            cpu_offload=stage.cpu_offload,
            profile=profile,
        )


@contextmanager
def _memory_remedy(remedy: str) -> Iterator[None]:
    """Turn PyTorch's ways to say that memory ran out into one line."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the memory of the device is full; {remedy}") from error
