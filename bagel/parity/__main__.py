"""Run every recorded case through the engine and say how far each tensor is off.

    python -m bagel.parity DIR [--device cuda] [--tolerance 1e-4] [--topology bagel] [--engine vllm] [--json]
    python -m bagel.parity DIR --tensor-parallel-size 2                     on several ranks
    python -m bagel.parity DIR --cfg-parallel-size 3 --worker-backend ray   through services, the DiT's ranks on Ray
    python -m bagel.parity DIR --quantization fp8    instead: the distances of bfloat16 and of fp8 from float32

One line per case, table and bfloat16 case, with its largest error or what is wrong; the last line sums up. With --json
each line is an object with the error of every tensor. Exit code 1 when anything differs by more than is allowed or was
not compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from bagel.arguments import OnceParser
from bagel.deployment.parallel_settings import OnRanks
from bagel.deployment.settings import given, settings_of
from bagel.deployment.shared_settings import QUANTIZATIONS
from bagel.errors import BagelError
from bagel.model.device import choose_device
from bagel.parallel.config import ParallelConfig
from bagel.parallel.groups import UNDIVIDED
from bagel.parity.cases import compare_all, compare_on_ranks
from bagel.parity.formats import compare_formats, line
from bagel.parity.golden import Golden
from bagel.parity.report import Comparison
from bagel.parity.served import compare_served
from bagel.pipelines import BAGEL, PIPELINES

SIZES = {each.name for each in fields(ParallelConfig)}
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
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="report how far it lies from float32, beside bfloat16; no verdict"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON a case, with the error of every tensor")
    group = parser.add_argument_group("several ranks; with --topology or --worker-backend those of the DiT")
    for each in settings_of(OnRanks):
        each.add_to(group)
    args = parser.parse_args(argv)
    served = args.engine is not None or args.worker_backend is not None
    topology = args.topology or (BAGEL.model_type if served else None)
    try:
        golden = Golden(args.folder)
        choose_device(args.device)  # a GPU that is not there is an error in one line, before anything is loaded
        if args.quantization is not None:
            return _report_formats(golden, args.device, args.quantization, as_json=args.json)
        tolerance = TOLERANCE[torch.device(args.device).type] if args.tolerance is None else args.tolerance
        asked = given(vars(args), settings_of(OnRanks))
        ranks = OnRanks(**asked)
        if topology is not None:
            sizes = {name: asked.pop(name) for name in SIZES & asked.keys()}
            reports = compare_served(golden, topology, args.device, tolerance, args.engine, sizes, **asked)
        elif ranks.parallel.world_size > 1:
            reports = compare_on_ranks(golden, args.device, tolerance, ranks.parallel)
        else:
            reports = compare_all(UNDIVIDED, args.device, golden, tolerance)
        return _run(golden, reports, tolerance, as_json=args.json)
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _report_formats(golden: Golden, device: str, quantization: str, *, as_json: bool) -> int:
    count = 0
    for name, found in compare_formats(golden, device, quantization):
        print(line(name, found, as_json=as_json), flush=True)
        count += 1
    return 0 if count else 1


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


if __name__ == "__main__":
    sys.exit(main())
