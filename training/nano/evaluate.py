"""Score a bagel-nano: prompts from a seed, pictures read by an independent checker, a table and a contact sheet.

python -m training.nano.evaluate --endpoint HOST:PORT --seed 7           through a gateway
python -m training.nano.evaluate --model RUN/checkpoint --seed 7         in this process
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw

from bagel.events import Result
from bagel.request import Request
from training.nano.rows import ROWS, Case, Row, cases, judge, picture_of


class Generate(Protocol):
    """Something that serves requests, in their order."""

    def __call__(self, requests: Sequence[Request]) -> list[Result]: ...


@dataclass(frozen=True)
class Judged:
    """One case with what came back."""

    case: Case
    result: Result
    right: bool
    seen: str


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson interval of a share."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, z * z / count
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def through(endpoint: str, at_once: int) -> Generate:
    """A gateway."""
    from bagel.batch import ask_of, generate_all  # gRPC is not needed otherwise

    def generate(requests: Sequence[Request]) -> list[Result]:
        return generate_all(endpoint, [ask_of(request) for request in requests], at_once=at_once)

    return generate


def in_process(folder: Path, device: str, dtype: str, batch: int) -> Generate:
    """An engine of this process."""
    import torch

    from bagel.engine.engine import BagelEngine
    from bagel.model.checkpoint import Checkpoint

    engine = BagelEngine.load(
        Checkpoint(folder), dtype=getattr(torch, dtype), device=torch.device(device), max_num_seqs=batch
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
    """All rows, each printed as it is done; a row that fails, or comes after `until` (monotonic), is left out."""
    judged: dict[str, list[Judged]] = {}
    for row in rows:
        if time.monotonic() > until:
            print(f"{row.name}: no time left", flush=True)
            continue
        start = time.monotonic()
        try:
            asked = cases(row, seed, count, steps)
            results = generate([case.request for case in asked])
            judged[row.name] = [
                Judged(case, result, *judge(case, result)) for case, result in zip(asked, results, strict=True)
            ]
        except Exception as error:  # one row less is better than none
            print(f"{row.name}: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{line(row, judged[row.name])}  {time.monotonic() - start:.1f} s", flush=True)
    return judged


def line(row: Row, judged: Sequence[Judged]) -> str:
    """A row of the table."""
    right, count = sum(each.right for each in judged), len(judged)
    low, high = wilson(right, count)
    goal = f"{row.goal:.0%}" if row.goal is not None else ""
    return f"{row.name:<22} {right:>4}/{count:<4} {right / max(1, count):>6.1%}  [{low:.1%}, {high:.1%}]  {goal:>4}"


def sheet(judged: dict[str, list[Judged]], columns: int = 8) -> Image.Image:
    """Pictures of every drawing row, edits below their inputs; a red frame where the checker says no."""
    lines: list[list[tuple[Image.Image, bool]]] = []
    for each in judged.values():
        drawn = [item for item in each if item.result.image is not None][:columns]
        if not drawn:
            continue
        sources = [item.case.example.source for item in drawn]
        if all(source is not None for source in sources):
            lines.append([(picture_of(source), True) for source in sources if source is not None])
        lines.append([(item.result.image, item.right) for item in drawn if item.result.image is not None])
    canvas = Image.new("RGB", (columns * 136 + 8, len(lines) * 136 + 8), (210, 210, 210))
    pen = ImageDraw.Draw(canvas)
    for y, entries in enumerate(lines):
        for x, (picture, right) in enumerate(entries):
            corner = (8 + 136 * x, 8 + 136 * y)
            canvas.paste(picture, corner)
            if not right:
                pen.rectangle((corner[0] - 3, corner[1] - 3, corner[0] + 130, corner[1] + 130), outline="red", width=3)
    return canvas


def write(judged: dict[str, list[Judged]], folder: Path, seed: int) -> None:
    """table.txt, results.json (with the wrong ones in words) and sheet.png."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {row.name: row for row in ROWS}
    (folder / "table.txt").write_text("\n".join(line(named[name], each) for name, each in judged.items()) + "\n")
    content = {
        name: {
            "seed": seed,
            "right": sum(item.right for item in each),
            "count": len(each),
            "wrong": [_mistake(item) for item in each if not item.right][:40],
        }
        for name, each in judged.items()
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    sheet(judged).save(folder / "sheet.png")


def _mistake(item: Judged) -> dict[str, str]:
    example = item.case.example
    return {"prompt": example.texts[-1], "answer": example.answer or "", "seen": item.seen, "text": item.result.text}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.nano.evaluate", description="Score a bagel-nano.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--endpoint", default="localhost:8000", help="a running gateway")
    where.add_argument("--model", type=Path, help="a checkpoint, loaded in this process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="requests a row")
    parser.add_argument("--rows", default="", help="only rows whose name has one of these words, with commas between")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("demo-output/eval-nano"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8, help="requests at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further row after so long")
    args = parser.parse_args(argv)
    until = time.monotonic() + args.seconds
    wanted = [word.strip() for word in args.rows.split(",") if word.strip()]
    rows = [row for row in ROWS if not wanted or any(word in row.name for word in wanted)]
    if args.model is not None:
        generate = in_process(args.model, args.device, args.dtype, args.batch)
    else:
        generate = through(args.endpoint, args.batch)
    judged = evaluate(generate, rows, args.seed, args.count, args.steps, until)
    write(judged, args.out, args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
