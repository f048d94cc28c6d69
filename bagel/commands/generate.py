"""`bagel generate`: flags to requests, the engine in this process, pictures and answers out.

Whatever can be wrong with the flags is told before torch is imported, let alone a model loaded.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from importlib import import_module
from pathlib import Path
from threading import TIMEOUT_MAX, Thread
from typing import Protocol, TypeVar, cast

import bagel
from bagel.commands.flags import INIT_TIMEOUT_S, INTERRUPTED, OUTPUT, flag_name
from bagel.commands.inputs import make_requests, notes_on_flags, prompt_text
from bagel.commands.outputs import Output, make_folder
from bagel.commands.progress import say, shown
from bagel.commands.tables import profile_table, stats_table
from bagel.config import DeployConfig, effective_settings, load_deploy_config, shipped_deploy_config
from bagel.errors import BagelError, CheckpointError, ConfigError, InitTimeout, NotSupported
from bagel.events import OnEvent, Result
from bagel.model.checkpoint import Checkpoint, find_checkpoint
from bagel.model.sizes import check_positions, picture_size, position_limit, text_positions
from bagel.pipelines import BAGEL_SINGLE_STAGE
from bagel.prompts import TextPart
from bagel.request import Request

T = TypeVar("T")

LOCAL_ENGINE = "bagel.local"
"""The torch side, by name: an import statement would bring torch into the command line."""
TEST_MODEL = Path(bagel.__file__).resolve().parents[1] / "tests" / "golden" / "checkpoint"
TEST_MODEL_NAME = "tests/golden/checkpoint"
UNBUILT = {
    "quantization": "leave it out",
    "ray_address": "leave it out",
    "endpoint": "it comes with the services; leave it out to run the model in this process",
}
"""Flags without any value that works yet, each with what to do instead."""


class Engine(Protocol):
    """What the command needs of an engine; bagel.local has it."""

    device: str
    dtype: str

    def generate(self, requests: Sequence[Request], on_event: OnEvent | None = None) -> list[Result]: ...


def generate(args: argparse.Namespace) -> None:
    """Run the command; raises BagelError for everything that a user can have got wrong."""
    _refuse_unbuilt_flags(args)
    config = _deployment(args.deploy_config)
    defaults = config.sampling_defaults()
    requests = make_requests(args, defaults)
    model, checkpoint = find_model(args.model)
    draws = requests[0].modality.makes_image
    about = {"model": model, "fingerprint": checkpoint.fingerprint.hex()}  # read now: it tells of missing files
    limit = position_limit(checkpoint.config, config.stage(config.spec.stage("dit").stage_id).max_model_len)
    for request in requests:  # tells of sizes and lengths that the model has no positions for
        if draws:
            picture_size(request, checkpoint.config)
        check_positions(_fewest_positions(request), text_positions(request), limit)
    folder = make_folder(args.output or OUTPUT) if draws else None
    for note in (*config.notes(), *notes_on_flags(args, requests[0], defaults)):  # an error stands alone
        say(f"note: {note}")
    if not _named_model(args.model):
        say("no --model given: using the tests' tiny random model, whose pictures and answers mean nothing")
    engine = _load(args, config, model, checkpoint)
    about["dtype"] = engine.dtype
    with shown([prompt_text(request) for request in requests]) as progress:
        results = engine.generate(requests, Output(requests, folder, about, progress))
    if args.log_stats:
        print(stats_table(requests, results), file=sys.stderr)
    if args.enable_diffusion_pipeline_profiler and draws:
        print(profile_table(requests, results), file=sys.stderr)


def find_model(name: str | None) -> tuple[str, Checkpoint]:
    """A model and what to call it: the one named, BAGEL_MODEL's, or the tests' own.

    Raises CheckpointError if it is not there.
    """
    name = _named_model(name)
    if name:
        with _missing_install_told():  # a name on the hub needs its client
            return name, find_checkpoint(name)
    if not TEST_MODEL.is_dir():
        raise CheckpointError("no model is given; use --model FOLDER, or set BAGEL_MODEL in the environment")
    return TEST_MODEL_NAME, find_checkpoint(str(TEST_MODEL))


def _fewest_positions(request: Request) -> int:
    """Positions that the parts of a prompt take at least: two delimiters of a text, one of an image's blocks."""
    return sum(2 if isinstance(part, TextPart) else 1 for part in request.prompt)


def _named_model(flag: str | None) -> str | None:
    return flag or os.environ.get("BAGEL_MODEL", "").strip() or None


def _refuse_unbuilt_flags(args: argparse.Namespace) -> None:
    """Raise NotSupported for a flag whose effect is not built yet."""
    for flag, instead in UNBUILT.items():
        if (value := getattr(args, flag)) is not None:
            raise NotSupported(f"{flag_name(flag)} {value!r} is not built yet; {instead}")
    if args.worker_backend == "ray":
        raise NotSupported("--worker-backend ray is not built yet; only process works")
    branches = args.cfg_parallel_size
    if branches is not None and not 1 <= branches <= 3:
        raise ConfigError(f"--cfg-parallel-size is {branches}; it must be 1, 2 or 3, of which only 1 is built yet")
    if branches in (2, 3):
        raise NotSupported(
            f"--cfg-parallel-size {branches} is not built yet; only 1 works, guidance batched on one GPU"
        )


def _deployment(path: str | None) -> DeployConfig:
    """The deploy file's settings; NotSupported if it is for more than one stage."""
    shipped = shipped_deploy_config(BAGEL_SINGLE_STAGE.model_type)
    config = load_deploy_config(path or shipped)
    if config.spec is not BAGEL_SINGLE_STAGE:
        raise NotSupported(
            f"{config.source} is for the pipeline {config.pipeline}, whose stages come with the services; "
            f"use --deploy-config deploy/{shipped.name} or leave it out"
        )
    return config


def _load(args: argparse.Namespace, config: DeployConfig, model: str, checkpoint: Checkpoint) -> Engine:
    """The engine, ready; InitTimeout naming the stage if that takes longer than --init-timeout."""
    spec = config.spec.stage("dit")
    stage = config.stage(spec.stage_id)
    seconds = args.init_timeout or INIT_TIMEOUT_S
    say(f"loading {model}")

    def load() -> Engine:
        with _missing_install_told():
            local = import_module(LOCAL_ENGINE)
        return cast(Engine, local.load(checkpoint, stage, device=args.device or "auto", dtype=args.dtype or "auto"))

    late = InitTimeout(
        f"stage {spec.stage_id} ({spec.model_stage}) was not ready after {seconds} s of loading {model}; "
        "give it longer with --init-timeout"
    )
    engine = within(seconds, load, late)
    if engine.device == "cpu" and any(stage.device_ids):  # the default, GPU 0, is nobody's wish
        say(f"note: {stage.where}: devices {stage.devices!r} has no effect on a CPU")
    say(f"{effective_settings(stage)}, device {engine.device}, dtype {engine.dtype}")
    return engine


@contextlib.contextmanager
def _missing_install_told() -> Iterator[None]:
    """What only the engine needs is not part of the smallest installation."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"the model cannot run in this process: {error}; install bagel-serving[engine]") from error


def within(seconds: float, work: Callable[[], T], late: BagelError) -> T:
    """The result of work, done in a thread of its own; raises late if it takes longer than that.

    A thread cannot be stopped. If this one is left behind, by the time or by Ctrl-C, the process will end without
    Python's tidying up, which can crash under a thread that is still inside torch.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="loading", daemon=True).start()
    try:
        wait([future], min(seconds, TIMEOUT_MAX))
    except KeyboardInterrupt:
        atexit.register(_leave_at_once, INTERRUPTED)
        raise
    if not future.done():
        atexit.register(_leave_at_once, late.exit_code)
        raise late
    return future.result()


def _leave_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
