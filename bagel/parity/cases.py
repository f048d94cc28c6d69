"""All cases of a folder, repeated through one engine: in this process, or on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from bagel.engine.local import BagelEngine
from bagel.engine.on_ranks import on_ranks
from bagel.parallel.config import ParallelConfig
from bagel.parallel.groups import Groups
from bagel.parity.bf16 import Run, compare_bf16
from bagel.parity.golden import Case, Golden
from bagel.parity.parts import NOT_RESULTS, compare_components, compare_table
from bagel.parity.prompts import with_transforms
from bagel.parity.report import Comparison, absolute
from bagel.parity.runs import compare_picture, compare_prefill, compare_text, divided

FIRST_STEP = ("step0.", "latent_position_ids")
"""How the names of what was recorded inside of a picture's first step begin."""


def compare_on_ranks(
    golden: Golden, device: str, tolerance: float, parallel: ParallelConfig, names: tuple[str, ...] = ()
) -> Iterator[Comparison]:
    """As compare_all on ranks, each a process; names: of the cases in float32, if not all. Raises RunnerDied."""
    parallel.check_model(golden.checkpoint.config.llm)
    return on_ranks(parallel, device, _compare_on_rank, golden.root, tolerance, names)


def _compare_on_rank(
    groups: Groups, device: str, root: Path, tolerance: float, names: tuple[str, ...]
) -> Iterator[Comparison]:
    for report in compare_all(groups, device, Golden(root), tolerance, names):
        # What a line says of it: the recordings themselves need not go from process to process.
        yield replace(report, tensors={}, judge=_judged)


def _judged(name: str, ours: Tensor, wanted: Tensor) -> str | None:
    raise AssertionError(f"{name} was judged on a rank")


def compare_all(
    groups: Groups, device: str, golden: Golden, tolerance: float, names: tuple[str, ...] = ()
) -> Iterator[Comparison]:
    """Every table and case through an engine of this process, which may be one rank of several.

    names: of the cases in float32, if not all.
    """
    engine = BagelEngine.load(golden.checkpoint, device=device, groups=groups)
    for path in golden.tables():
        if not names and path.stem not in NOT_RESULTS:
            yield compare_table(path, engine.tokenizer)
    run = runner(golden)

    def recorded(case: Case) -> Comparison:
        report = Comparison(case.name, case.tensors, absolute(tolerance))
        report.require(*case.data["tensors"])
        return report

    for case in golden.cases("fp32"):
        if not names or case.name in names:
            yield run(engine, case, case.name, partial(recorded, case))
    if not names:
        yield from compare_bf16(golden, device, run, groups)


def runner(golden: Golden) -> Run:
    """What repeats a case of these and fills its comparison."""
    fingerprint = golden.checkpoint.fingerprint

    def run(engine: BagelEngine, case: Case, name: str, make: Callable[[], Comparison]) -> Comparison:
        try:
            report = make()
        except Exception as error:  # a damaged or missing file is one failure, not the end of the rest
            return Comparison(name, {}, absolute(0.0), failures=[_one_line(error)])
        if divided(engine):
            report.tensors = {name: each for name, each in report.tensors.items() if not name.startswith(FIRST_STEP)}
        try:
            compare_case(with_transforms(engine, case, fingerprint), case, report)
            report.finish(case.data["images"])
        except Exception as error:  # so is a case that cannot be repeated
            report.failures.append(_one_line(error))
        return report

    return run


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def compare_case(engine: BagelEngine, case: Case, report: Comparison) -> None:
    """Repeat one recorded case and compare everything that it recorded."""
    if case.name == "components":
        compare_components(engine.model, report)
    elif "turns" in case.data:
        compare_prefill(engine, case, report)
    elif "num_timesteps" in case.settings:
        compare_picture(engine, case, report)
    else:
        compare_text(engine, case, report)
