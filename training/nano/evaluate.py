"""Score a bagel-nano: prompts from a seed, an independent checker for pictures, a table and a contact sheet.

bagel eval-nano --seed 7                                                 starts its own services
python -m training.nano.evaluate --endpoint HOST:PORT --seed 7           uses a running gateway
python -m training.nano.evaluate --model RUN/checkpoint --seed 7         runs in this process
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bagel.arguments import OnceParser
from bagel.deployment.shared_settings import QUANTIZATIONS
from bagel.errors import BagelError
from bagel.events import Result
from bagel.prompts import TextPart
from bagel.request import Request
from training.nano.rows import ROWS, Case, Row, cases, judge, picture_of, rows_named
from training.nano.sheet import Cell, Section, contact_sheet

COLUMNS = 8
"""Cases per row on the contact sheet: the first ones, right or wrong."""
MISTAKES = 40
"""The most mistakes per row in results.json."""
HEADER = f"{'row':<26} {'right':>9} {'share':>7}  {'95% interval':<15}  {'goal':>4}"


class Generate(Protocol):
    """A function that serves requests and returns the results in the same order."""

    def __call__(self, requests: Sequence[Request]) -> list[Result]: ...


@dataclass(frozen=True)
class Judged:
    """One case, its result, and the verdict; seen: what the checker saw, in words."""

    case: Case
    result: Result
    right: bool
    seen: str


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share, which stays within 0 and 1; 95% by default."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, z * z / count
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def through(endpoint: str, at_once: int) -> Generate:
    """Serve requests through a running gateway."""
    from bagel.client.batch import ask_of, generate_all  # imported late: the other way needs no gRPC

    def generate(requests: Sequence[Request]) -> list[Result]:
        return generate_all(endpoint, [ask_of(request) for request in requests], at_once=at_once)

    return generate


def in_process(folder: Path, device: str, dtype: str, batch: int, quantization: str | None = None) -> Generate:
    """Serve requests with an engine in this process."""
    import torch

    from bagel.checkpoint.files import Checkpoint
    from bagel.engine.local import BagelEngine

    engine = BagelEngine.load(
        Checkpoint(folder),
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        max_num_seqs=batch,
        quantization=quantization,
    )

    def generate(requests: Sequence[Request]) -> list[Result]:
        results: list[Result] = []
        for start in range(0, len(requests), batch):
            results += engine.generate(requests[start : start + batch])
        return results

    return generate


def evaluate(
    generate: Generate, rows: Sequence[Row], seed: int, count: int, steps: int, until: float = math.inf
) -> dict[str, list[Judged]]:
    """Evaluate and print all rows; leaves out rows that fail, and rows after the monotonic time `until`."""
    judged: dict[str, list[Judged]] = {}
    print(HEADER, flush=True)
    for row in rows:
        if time.monotonic() > until:
            print(f"{row.name}: no time left", flush=True)
            continue
        start = time.monotonic()
        try:
            asked = cases(row, seed, count, steps)
            results = generate([case.request for case in asked])  # in one call, so that the engine can batch them
        except Exception as error:  # the other rows are still worth having
            print(f"{row.name}: {type(error).__name__}: {error}", flush=True)
            continue
        judged[row.name] = [
            Judged(case, result, *judge(case, result)) for case, result in zip(asked, results, strict=True)
        ]
        print(f"{line(row, judged[row.name])}  {time.monotonic() - start:.0f} s", flush=True)
    return judged


def line(row: Row, judged: Sequence[Judged]) -> str:
    """One row of the table."""
    right, count = sum(each.right for each in judged), len(judged)
    low, high = wilson(right, count)
    goal = f"{row.goal:.0%}" if row.goal is not None else ""
    interval = f"{low:.1%} to {high:.1%}"
    return f"{row.name:<26} {right:>4}/{count:<4} {right / max(1, count):>7.1%}  {interval:<15}  {goal:>4}"


def section(row: Row, judged: Sequence[Judged]) -> Section | None:
    """A row's first cases: the input picture, if any, above the drawn one; prompts and answers as captions."""
    cells = []
    for item in judged[:COLUMNS]:
        source, drawn = item.case.example.source, item.result.image
        pictures = [picture_of(source)] if source is not None else []
        reply = item.result.text if drawn is None or row.think else ""
        caption = item.case.example.texts[-1] + (f"\n{reply}" if reply else "")
        if drawn is not None:
            pictures.append(drawn)
        if pictures:
            cells.append(Cell(tuple(pictures), caption, item.right))
    title = f"{row.name}: {sum(item.right for item in judged)} of {len(judged)} right"
    return Section(title, tuple(cells)) if cells else None


def write(judged: dict[str, list[Judged]], folder: Path, about: Mapping[str, Any]) -> None:
    """Write table.txt, results.json (which describes the mistakes) and sheet.png; about: the evaluation's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {row.name: row for row in ROWS}
    table = [line(named[name], each) for name, each in judged.items()]
    (folder / "table.txt").write_text("\n".join([HEADER, *table]) + "\n")
    content = {**about, "rows": {name: _content(named[name], each) for name, each in judged.items()}}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    sections = (section(named[name], each) for name, each in judged.items())
    contact_sheet([each for each in sections if each is not None]).save(folder / "sheet.png")


def _content(row: Row, judged: Sequence[Judged]) -> dict[str, Any]:
    right, count = sum(item.right for item in judged), len(judged)
    return {
        "right": right,
        "count": count,
        "interval": [round(bound, 4) for bound in wilson(right, count)],
        "goal": row.goal,
        "wrong": [_mistake(item) for item in judged if not item.right][:MISTAKES],
    }


def _mistake(item: Judged) -> dict[str, str | int]:
    example, request = item.case.example, item.case.request
    prompt = " ".join(part.text for part in request.prompt if isinstance(part, TextPart))
    texts = {"prompt": prompt, "answer": example.answer or "", "seen": item.seen, "text": item.result.text}
    return {**texts, "seed": item.result.seed}


def score(
    generate: Generate, rows: Sequence[Row], folder: Path, *, seed: int, count: int, steps: int = 50, **about: Any
) -> None:
    """Evaluate, write everything to a folder and print its path; BagelError if a row failed."""
    judged = evaluate(generate, rows, seed, count, steps)
    write(judged, folder, {"seed": seed, "steps": steps, **about})
    print(f"table.txt, results.json and sheet.png are in {folder}", flush=True)
    if failed := [row.name for row in rows if row.name not in judged]:
        raise BagelError(f"not evaluated: {', '.join(failed)}; the errors are above")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print the table; returns 1 if a row failed or had no time."""
    parser = OnceParser(prog="python -m training.nano.evaluate", description="Score a bagel-nano.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", help="a running gateway's HOST:PORT")
    where.add_argument("--model", type=Path, help="a checkpoint, loaded in this process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="requests a row")
    parser.add_argument("--rows", default="", help="only rows whose name has one of these words, with commas between")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("demo-output/eval-nano"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="with --model")
    parser.add_argument("--batch", type=int, default=8, help="requests at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further row after so long")
    args = parser.parse_args(argv)
    until = time.monotonic() + args.seconds
    try:
        rows = rows_named([word.strip() for word in args.rows.split(",") if word.strip()])
        if args.model is not None:
            generate = in_process(args.model, args.device, args.dtype, args.batch, args.quantization)
        else:
            generate = through(args.endpoint, args.batch)
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    judged = evaluate(generate, rows, args.seed, args.count, args.steps, until)
    write(judged, args.out, {"seed": args.seed, "steps": args.steps, "model": str(args.model or args.endpoint)})
    return 0 if len(judged) == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
