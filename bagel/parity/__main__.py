"""Run every recorded case through the engine and say how far each tensor is off.

    python -m bagel.parity DIR [--device cuda] [--tolerance 1e-4] [--topology bagel] [--engine vllm] [--json]

One line per case, table and bfloat16 case, with its largest error or what is wrong; the last line sums up. With --json
each line is an object with the error of every tensor. Exit code 1 when anything differs by more than is allowed or was
not compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from bagel.arguments import OnceParser
from bagel.engine.local import BagelEngine
from bagel.errors import BagelError
from bagel.model.device import choose_device
from bagel.parity.bf16 import compare_bf16
from bagel.parity.golden import Case, Golden
from bagel.parity.parts import NOT_RESULTS, compare_components, compare_table
from bagel.parity.prompts import with_transforms
from bagel.parity.report import Comparison, absolute
from bagel.parity.runs import compare_picture, compare_prefill, compare_text
from bagel.parity.served import compare_served
from bagel.pipelines import BAGEL, PIPELINES

TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare everything in a folder; 0 if it all agrees, 1 if not, 2 if the folder has no recordings."""
    parser = OnceParser(prog="python -m bagel.parity", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="recordings: checkpoint/, inputs/, fp32/, tables/, README.md")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--tolerance", type=float, help="largest absolute error in float32 (cpu 1e-4, cuda 1e-3)")
    parser.add_argument(
        "--topology", choices=tuple(PIPELINES), help="run the end-to-end cases through real services of this topology"
    )
    parser.add_argument(
        "--engine", choices=("torch", "vllm"), help="the Thinker's, with --topology (which is then bagel if not given)"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON a case, with the error of every tensor")
    args = parser.parse_args(argv)
    topology = args.topology or (None if args.engine is None else BAGEL.model_type)
    try:
        golden = Golden(args.folder)
        choose_device(args.device)  # a GPU that is not there is an error in one line, before anything is loaded
        tolerance = TOLERANCE[torch.device(args.device).type] if args.tolerance is None else args.tolerance
        if topology is None:
            reports = _reports(golden, args.device, tolerance)
        else:
            reports = compare_served(golden, topology, args.device, tolerance, args.engine)
        return _run(golden, reports, tolerance, as_json=args.json)
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(golden: Golden, reports: Iterator[Comparison], tolerance: float, *, as_json: bool) -> int:
    start = before = time.perf_counter()
    failed, count = [], 0
    for report in reports:
        now = time.perf_counter()
        print(report.as_json(now - before) if as_json else report.line(now - before), flush=True)
        before, count = now, count + 1
        failed += [report.case] if report.failures else []
    # A case that was lost must not pass unseen.
    failed += [f"{name} (listed but not there)" for name in golden.missing()]
    seconds = round(time.perf_counter() - start, 1)
    if as_json:
        print(json.dumps({"cases": count, "failed": failed, "tolerance": tolerance, "seconds": seconds}))
    else:
        print(_summary(count, failed, tolerance, seconds))
    # A folder without cases proves nothing.
    return 1 if failed or not count else 0


def _summary(count: int, failed: Sequence[str], tolerance: float, seconds: float) -> str:
    if failed:
        return f"wrong: {', '.join(failed)}; --json says where ({count} cases, tolerance {tolerance:g}, {seconds} s)"
    return f"all {count} cases agree within {tolerance:g} ({seconds} s)" if count else "there is no case"


def _reports(golden: Golden, device: str, tolerance: float) -> Iterator[Comparison]:
    engine = BagelEngine.load(golden.checkpoint, device=device)
    for path in golden.tables():
        if path.stem not in NOT_RESULTS:
            yield compare_table(path, engine.tokenizer)
    fingerprint = golden.checkpoint.fingerprint

    def run(engine: BagelEngine, case: Case, name: str, make: Callable[[], Comparison]) -> Comparison:
        try:
            report = make()
        except Exception as error:  # a damaged or missing file is one failure, not the end of the rest
            return Comparison(name, {}, absolute(tolerance), failures=[_one_line(error)])
        try:
            compare_case(with_transforms(engine, case, fingerprint), case, report)
            report.finish(case.data["images"])
        except Exception as error:  # so is a case that cannot be repeated
            report.failures.append(_one_line(error))
        return report

    def recorded(case: Case) -> Comparison:
        report = Comparison(case.name, case.tensors, absolute(tolerance))
        report.require(*case.data["tensors"])
        return report

    for case in golden.cases("fp32"):
        yield run(engine, case, case.name, partial(recorded, case))
    yield from compare_bf16(golden, device, run)


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


if __name__ == "__main__":
    sys.exit(main())
