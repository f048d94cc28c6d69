"""The cost of --enable-diffusion-pipeline-profiler: the same picture with and without it, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from bagel.checkpoint.files import Checkpoint
from bagel.client import Client
from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.engine.local import BagelEngine
from bagel.pipelines import BAGEL_SINGLE_STAGE
from bagel.prompts import TextPart
from bagel.request import Modality, resolve
from bench.report import Table
from bench.timing import compare

LIMIT = 1.02
"""The longest time that a picture may take with the profiler, as a multiple of the time without it."""
HERE = "in one process"
PROMPT = "a large red circle"
NOTE = f"{NANO_NAME}, text-to-image, 50 timesteps, on a CPU; medians of interleaved samples; limit {LIMIT:g}"

Draw = Callable[[], object]


def run(only: str, repeats: int) -> Iterator[Table]:
    """Measure every case whose name contains `only`: in one process, and through the services of a single stage."""
    table = Table("diffusion pipeline profiler", NOTE)
    _, checkpoint = find_model(NANO_NAME)
    for case, make in {HERE: _here, "single stage, as services": _served}.items():
        if only in case:
            with ExitStack() as stack:
                _measure(table, case, *make(checkpoint, stack), repeats)
    yield table


def _here(checkpoint: Checkpoint, _: ExitStack) -> tuple[Draw, Draw]:
    """Draw with and without the profiler, on two engines with the same model."""
    plain = BagelEngine.load(checkpoint)
    profiling = BagelEngine(plain.loaded, profile=True)
    request = resolve(Modality.TEXT2IMG, (TextPart(PROMPT),), {"seed": 1})
    return lambda: profiling.generate([request]), lambda: plain.generate([request])


def _served(checkpoint: Checkpoint, stack: ExitStack) -> tuple[Draw, Draw]:
    """Draw with and without the profiler, on two deployments."""
    config = load_deploy_config(shipped_deploy_config(BAGEL_SINGLE_STAGE.model_type))

    def client(profile: bool) -> Client:
        deployment = Deployment(config, checkpoint.folder, device="cpu", enable_diffusion_pipeline_profiler=profile)
        return stack.enter_context(Client(stack.enter_context(deployment).address))

    profiling, plain = client(True), client(False)
    return lambda: profiling.generate(PROMPT, seed=1), lambda: plain.generate(PROMPT, seed=1)


def _measure(table: Table, case: str, profiling: Draw, plain: Draw, repeats: int) -> None:
    result = compare(profiling, plain, repeats)
    low, high = result.spread
    table.add(
        case=case,
        with_ms=1e3 * result.ours_s,
        without_ms=1e3 * result.control_s,
        ratio=result.ratio,
        quartiles=f"{low:.3f} to {high:.3f}",
        cpu_ratio=result.cpu_ratio if case == HERE else None,  # services compute in other processes
        pairs=len(result.ours),
    )
    table.failed |= result.ratio > LIMIT
