"""`bagel generate`: flags to requests, whatever serves them, pictures and answers out.

A deploy file of one stage, and none, run the model in this process; one of two stages starts its services for the
command's own time; --endpoint asks a gateway that runs. Errors in the flags are reported first.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from importlib import import_module
from pathlib import Path
from threading import TIMEOUT_MAX, Thread
from typing import Protocol, TypeVar, cast

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import check_positions, picture_size, position_limit, text_positions
from bagel.cli.endpoint import api_key_of, refuse_without_endpoint, security_of
from bagel.cli.flags import (
    INIT_TIMEOUT_S,
    INTERRUPTED,
    OUTPUT,
    REQUEST_FLAGS,
    SERVER_FLAGS,
    flag_name,
    request_option,
    stage_settings,
)
from bagel.cli.inputs import flags_named, located, make_requests, notes_on_flags, prompts_of
from bagel.cli.outputs import Output, make_folder
from bagel.cli.progress import say, shown
from bagel.cli.prompts import GivenPrompt
from bagel.client.stats import Firsts, stats_table
from bagel.client.tables import profile_table
from bagel.deployment.defaults import (
    NANO_NOTE,
    find_model,
    missing_install_named,
    model_label,
    named_model,
)
from bagel.deployment.deploy_file import effective_settings, load_deploy_config, request_defaults, shipped_deploy_config
from bagel.deployment.parallel_settings import check_ray_address
from bagel.deployment.schema import DeployConfig
from bagel.errors import BagelError, ConfigError, InitTimeout
from bagel.events import Result, ServiceEvent
from bagel.pipelines import BAGEL_SINGLE_STAGE
from bagel.prompts import TextPart, prompt_text
from bagel.request import Request

T = TypeVar("T")
OnEvent = Callable[[ServiceEvent], None]
Run = Callable[[Sequence[Request], OnEvent], list[Result]]

LOCAL_ENGINE = "bagel.engine.local"
"""The torch side, by name: an import statement would bring torch into the command line."""


class Engine(Protocol):
    """What the command needs of an engine; bagel.engine.local has it, and so have the services."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def fingerprint(self) -> bytes: ...

    def generate(self, requests: Sequence[Request], on_event: OnEvent | None = None) -> list[Result]: ...


def generate(args: argparse.Namespace) -> None:
    """Run the command; raises BagelError for everything that a user can have got wrong."""
    if args.endpoint is not None:
        _generate_there(args)
    else:
        _generate_here(args)


def _generate_here(args: argparse.Namespace) -> None:
    backend = args.worker_backend or "process"
    check_ray_address(backend, args.ray_address)
    refuse_without_endpoint(args)
    deploy = args.deploy_config or shipped_deploy_config(BAGEL_SINGLE_STAGE.model_type)
    config = load_deploy_config(deploy, **stage_settings(args))
    # Ranks are a service's: this process is one alone.
    ranks = max(stage.world_size for stage in config.stages)
    in_process = len(config.spec.stages) == 1 and ranks == 1 and backend == "process"
    defaults = request_defaults(config)
    prompts = prompts_of(args)
    requests = make_requests(args, prompts, defaults)
    # After the flags are checked, since finding the model may mean to download it.
    model, checkpoint = find_model(args.model)
    _check_with_model(prompts, requests, config, checkpoint)
    # Made after all checks, so that a mistake leaves no folder behind.
    folder = _folder(args, requests)
    notes = notes_on_flags(args, requests[0], defaults, in_process=in_process)
    for note in (*config.notes(), *notes):  # an error stands alone
        say(f"note: {note}")
    if not named_model(args.model):
        say(NANO_NOTE)
    say(f"loading {model}")
    open_engine = _in_process if in_process else _in_services
    with open_engine(args, config, model, checkpoint) as engine:
        about = {"model": model_label(model), "fingerprint": engine.fingerprint.hex(), "dtype": engine.dtype}
        _produce(args, prompts, requests, folder, about, engine.generate)


def _generate_there(args: argparse.Namespace) -> None:
    """At a running gateway, which fills in what the user does not say."""
    if given := [flag_name(flag) for flag in SERVER_FLAGS if getattr(args, flag) is not None]:
        raise ConfigError(f"--endpoint is a gateway that runs as it is; leave out {', '.join(given)}")
    prompts = prompts_of(args)
    requests = make_requests(args, prompts, {})
    from bagel.client.batch import generate_all
    from bagel.client.omni import describe

    # Read before the gateway is asked, so that a file that is wrong is named first.
    security, api_key = security_of(args), api_key_of(args)
    model = describe(args.endpoint, security=security, api_key=api_key)
    about = {"model": model_label(model.name), "fingerprint": model.checkpoint_fingerprint.hex(), "dtype": model.dtype}
    # Made after all checks, so that a mistake leaves no folder behind.
    folder = _folder(args, requests)
    for note in notes_on_flags(args, requests[0], {}, in_process=False):
        say(f"note: {note}")
    options = {request_option(flag): getattr(args, flag) for flag in REQUEST_FLAGS}
    asks = [{"prompt": each.prompt, "modality": each.modality, **options} for each in requests]

    def run(_: Sequence[Request], on_event: OnEvent) -> list[Result]:
        return generate_all(args.endpoint, asks, on_event, security=security, api_key=api_key)

    _produce(args, prompts, requests, folder, about, run)


def _produce(
    args: argparse.Namespace,
    prompts: Sequence[GivenPrompt],
    requests: Sequence[Request],
    folder: Path | None,
    about: Mapping[str, str],
    run: Run,
) -> None:
    """Run the requests, give the user what comes, then the tables."""
    firsts = Firsts()
    with shown([prompt_text(request.prompt) for request in requests]) as progress:
        output = Output(requests, folder, about, progress)

        def on_event(event: ServiceEvent) -> None:
            firsts(event)
            output(event)

        with located(prompts), flags_named():
            results = run(requests, on_event)
    if args.log_stats:
        print(stats_table(requests, results, firsts), file=sys.stderr)
    if args.enable_diffusion_pipeline_profiler and folder is not None:
        print(profile_table(results), file=sys.stderr)


def _folder(args: argparse.Namespace, requests: Sequence[Request]) -> Path | None:
    """The folder for pictures; None for answers."""
    return make_folder(args.output or OUTPUT) if requests[0].modality.makes_image else None


def _check_with_model(
    prompts: Sequence[GivenPrompt], requests: Sequence[Request], config: DeployConfig, checkpoint: Checkpoint
) -> None:
    """Tell of sizes and lengths that the model has no positions for."""
    lengths = [stage.max_model_len for stage in config.stages if stage.max_model_len is not None]
    limit = position_limit(checkpoint.config, min(lengths, default=None))
    for number, request in enumerate(requests):
        with located(prompts, number), flags_named():
            if request.modality.makes_image:
                picture_size(request, checkpoint.config)
            check_positions(_fewest_positions(request), text_positions(request), limit)


def _fewest_positions(request: Request) -> int:
    """Positions that the parts of a prompt take at least: two delimiters of a text, one of an image's blocks."""
    return sum(2 if isinstance(part, TextPart) else 1 for part in request.prompt)


@contextlib.contextmanager
def _in_services(
    args: argparse.Namespace, config: DeployConfig, model: str, checkpoint: Checkpoint
) -> Iterator[Engine]:
    """The services of a deploy file, for as long as the command runs."""
    from bagel.cli.serve import deployment
    from bagel.client.omni import ServedEngine

    with deployment(args, config, model, checkpoint) as services:
        yield ServedEngine(services)


@contextlib.contextmanager
def _in_process(args: argparse.Namespace, config: DeployConfig, model: str, checkpoint: Checkpoint) -> Iterator[Engine]:
    yield _load(args, config, model, checkpoint)


def _load(args: argparse.Namespace, config: DeployConfig, model: str, checkpoint: Checkpoint) -> Engine:
    """The engine, ready; InitTimeout naming the stage if that takes longer than --init-timeout."""
    spec = config.spec.stage("dit")
    stage = config.stage(spec.stage_id)
    seconds = args.init_timeout or INIT_TIMEOUT_S

    def load() -> Engine:
        with missing_install_named():
            local = import_module(LOCAL_ENGINE)
        options = {"device": args.device or "auto", "dtype": args.dtype or "auto"}
        profile = bool(args.enable_diffusion_pipeline_profiler)
        return cast(Engine, local.load(checkpoint, stage, **options, profile=profile))

    late = InitTimeout(
        f"stage {spec.stage_id} ({spec.model_stage}) was not ready after {seconds} s of loading {model}; "
        "give it longer with --init-timeout"
    )
    engine = within(seconds, load, late)
    if engine.device == "cpu" and any(stage.device_ids):  # the default, GPU 0, was not asked for
        say(f"note: {stage.where}: devices {stage.devices!r} has no effect on a CPU")
    say(f"{effective_settings(stage)}, device {engine.device}, dtype {engine.dtype}")
    return engine


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
        # Python refuses to wait for longer than TIMEOUT_MAX.
        wait([future], min(seconds, TIMEOUT_MAX))
    except KeyboardInterrupt:
        atexit.register(_leave_at_once, INTERRUPTED)
        raise
    if not future.done():
        atexit.register(_leave_at_once, late.exit_code)
        raise late
    return future.result()


def _leave_at_once(code: int) -> None:
    # os._exit flushes nothing.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
