"""Write the model card of a run: python -m training.nano.card RUN EVALUATION ... [--out models/nano] [--write].

Reads RUN/log.jsonl and each EVALUATION/results.json, writes README.md and training.png. It takes all figures from these
files and neither trains nor evaluates.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from bagel.arguments import OnceParser
from training.nano.rows import ROWS

Entry = Mapping[str, Any]
Series = dict[str, list[tuple[float, float]]]
FILES = ("README.md", "training.png")
CURVES = ("l1", "draw_flow", "plan_flow", "edit_flow", "plan_text", "see_text", "reason_text")
NAMES = {
    "l1": "autoencoder: absolute error",
    "draw_flow": "drawing: flow",
    "plan_flow": "drawing after a plan: flow",
    "edit_flow": "edits: flow",
    "plan_text": "plans: text",
    "see_text": "answers: text",
    "reason_text": "reasoning: text",
}
COLOURS = ("#555555", "#d62828", "#f77f00", "#1d4ed8", "#b5179e", "#15803d", "#0e9aa7")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 460, 64, 250, 44, 52

CARD = """# bagel-nano

A small BAGEL of our own, in the exact layout of ByteDance-Seed/BAGEL-7B-MoT's checkpoint, so that every feature can
be seen and tested on a laptop's CPU: {parameters:.1f} M parameters, {size:.1f} MiB, pictures of {side} x {side}.
The code that serves it is the code that serves the 7B. Its world is coloured shapes on plain backgrounds, in
English.

## Data

Everything is procedural and drawn while training. Nothing is downloaded, and no picture or text of others is used.
Scenes hold up to four of seven shapes in eight colours and two sizes on five backgrounds. Texts come from templates
with synonyms and the ways people type. The tasks are drawing, edits (recolour, add, remove, move, background),
descriptions and questions, small sums, counting and colour mixing, and drawing or answering after a plan in words.
See `training/nano` and `docs/nano.md`.

## Training

{training}

![Losses over training](training.png)

## Evaluation

`bagel eval-nano --seed {seed}`, {how}:
prompts of a seed that training lacks, {steps} timesteps, default guidance. Pictures are judged by their pixels alone,
answers word for word. Intervals are 95% Wilson.

{table}

A drawing is right if it has exactly the objects of the prompt: shape and colour, and size, place, relation and
background where the prompt names them. An edit must also leave at least 95% of the untouched area unchanged. "think"
and "no guidance" have the prompts and seeds of the rows that they are named after.

## Limits

It knows nothing outside its world: it ignores or misreads other words, and describes other pictures as shapes. It
draws only {side} x {side}, with up to four objects, and counts no further. Its words for places are those of a 3 x 3
grid ("to the left" is the middle of the left side). An edit concerns one object or the background. No edit was trained
with a plan, so edits with think go wrong. It is for testing and for showing features, not a model of language or of
images. Apache-2.0.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the card."""
    parser = OnceParser(prog="python -m training.nano.card", description="Write the model card.")
    parser.add_argument("run", type=Path, help="folder with checkpoint/ and log.jsonl")
    parser.add_argument(
        "evaluation",
        type=Path,
        nargs="+",
        help="folder with results.json, as bagel eval-nano leaves it; rows of one seed",
    )
    parser.add_argument("--out", type=Path, default=Path("models/nano"))
    parser.add_argument("--write", action="store_true", help="also over files that are there already")
    args = parser.parse_args(argv)
    there = [str(path) for name in FILES if (path := args.out / name).exists()]
    if there and not args.write:
        parser.error(f"{' and '.join(there)} would be overwritten; give --write to do so, or another --out")
    entries = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines() if line.strip()]
    results = merged([json.loads((folder / "results.json").read_text()) for folder in args.evaluation])
    args.out.mkdir(parents=True, exist_ok=True)
    page, curves = (args.out / name for name in FILES)
    plot(*series(entries)).save(curves, optimize=True)
    page.write_text(card(entries, results, args.run / "checkpoint"))
    return 0


def merged(several: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Merge the results of several evaluations; ValueError if their settings differ."""
    rows: dict[str, Any] = {}
    for results in several:
        if any(results.get(key) != several[0].get(key) for key in ("seed", "steps", "fingerprint", "topology")):
            raise ValueError("the evaluations differ in seed, steps, weights or topology; evaluate them alike")
        rows |= results["rows"]
    order = [row.name for row in ROWS]
    devices = sorted({results["device"] for results in several if "device" in results})
    return {**several[0], "devices": devices, "rows": {name: rows[name] for name in sorted(rows, key=order.index)}}


def series(entries: Sequence[Entry]) -> tuple[Series, list[float]]:
    """The points (minutes of training, loss) of each curve, and the minutes at which later stages begin."""
    curves: Series = {name: [] for name in CURVES}
    starts, before = [], 0.0  # before: minutes of all earlier stages, since each stage's clock starts at 0
    for run in stages(entries):
        if before:
            starts.append(before)
        for entry in run:
            for name in CURVES:
                if isinstance(entry.get(name), float) and entry[name] > 0:  # the axis is logarithmic
                    curves[name].append((before + entry["s"] / 60, entry[name]))
        before += max(entry["s"] for entry in run) / 60
    return {name: points for name, points in curves.items() if points}, starts


def stages(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Group the entries by call of the training command."""
    runs: list[list[Entry]] = []
    for entry in entries:
        # A new call shows by another stage, or by a clock that starts again.
        if not runs or entry["stage"] != runs[-1][-1]["stage"] or entry["s"] < runs[-1][-1]["s"]:
            runs.append([])
        runs[-1].append(entry)
    return runs


def plot(curves: Series, starts: Sequence[float]) -> Image.Image:
    """Plot the losses on a logarithmic axis over minutes, with a vertical line where a stage begins."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, small = ImageDraw.Draw(image), ImageFont.load_default(12)
    values = [value for points in curves.values() for _, value in points]
    last = max(minute for points in curves.values() for minute, _ in points)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def at(minute: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * minute / last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / max(1, high - low)

    pen.text((LEFT, 12), "Losses of bagel-nano over minutes of training", fill="black", font=small)
    for power in range(low, high + 1):
        (_, y) = at(0, 10.0**power)
        pen.line((LEFT, y, WIDTH - RIGHT, y), fill="#dddddd")
        pen.text((LEFT - 8, y), f"{10.0**power:g}", fill="#444444", font=small, anchor="rm")
    for minute in range(0, int(last) + 1, max(1, int(last / 8))):
        x, y = at(minute, 10.0**low)
        pen.text((x, y + 8), str(minute), fill="#444444", font=small, anchor="ma")
    for start in starts:
        x, _ = at(start, 1)
        pen.line((x, TOP, x, HEIGHT - BOTTOM), fill="#bbbbbb", width=2)
    for index, (name, points) in enumerate(curves.items()):
        colour = COLOURS[CURVES.index(name)]
        pen.line([at(*point) for point in points], fill=colour, width=2)
        pen.line((WIDTH - RIGHT + 16, TOP + 10 + 24 * index, WIDTH - RIGHT + 40, TOP + 10 + 24 * index), colour, 3)
        pen.text((WIDTH - RIGHT + 48, TOP + 10 + 24 * index), NAMES[name], fill="black", font=small, anchor="lm")
    return image


def card(entries: Sequence[Entry], results: Mapping[str, Any], checkpoint: Path) -> str:
    """The text of README.md."""
    config = json.loads((checkpoint / "config.json").read_text())
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return CARD.format(
        parameters=weights / 2e6,  # bfloat16
        size=weights / 2**20,
        side=config["default_image_size"][0],
        training=training(entries),
        table=table(results["rows"]),
        seed=results["seed"],
        how=evaluated(results),
        steps=results["steps"],
    )


def evaluated(results: Mapping[str, Any]) -> str:
    """How and on which devices the evaluation ran, in words."""
    through = "through gateway, Thinker and DiT" if "topology" in results else "in one process"
    return " ".join((through, *(["on", " and ".join(results["devices"])] if results["devices"] else ())))


def training(entries: Sequence[Entry]) -> str:
    """The training's stages as a Markdown table: their devices, minutes and steps; below it their last losses."""
    lines = ["| stage | on | minutes | steps | parameters |", "|---|---|--:|--:|--:|"]
    ends: list[str] = []
    for run in stages(entries):
        steps = [entry["step"] for entry in run if "step" in entry]
        losses: dict[str, float] = {}
        for entry in run:
            losses |= {name: entry[name] for name in CURVES if isinstance(entry.get(name), float)}
        last = ", ".join(f"{NAMES[name]} {value:.3g}" for name, value in losses.items())
        device = next((entry["device"] for entry in run if "device" in entry), "")
        learned = next((f"{entry['learned'] / 1e6:.1f} M" for entry in run if "learned" in entry), "")
        minutes = f"{run[-1]['s'] / 60:.1f}"
        lines.append(f"| {run[0]['stage']} | {device} | {minutes} | {max(steps, default=0):,} | {learned} |")
        ends.append(textwrap.fill(f"- {run[0]['stage']}, {minutes} minutes: {last}", 118, subsequent_indent="  "))
    return "\n".join([*lines, "", "The last losses of each stage:", "", *ends])


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation as a Markdown table."""
    lines = ["| row | right | share | 95% interval | goal |", "|---|--:|--:|---|--:|"]
    for name, row in rows.items():
        low, high = row["interval"]
        goal = f"{row['goal']:.0%}" if row["goal"] is not None else ""
        share = row["right"] / row["count"]
        interval = f"{low:.1%} to {high:.1%}"
        lines.append(f"| {name} | {row['right']} of {row['count']} | {share:.1%} | {interval} | {goal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
