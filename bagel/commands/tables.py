"""The tables of --log-stats and --enable-diffusion-pipeline-profiler."""

from __future__ import annotations

from collections.abc import Sequence

from bagel.commands.inputs import prompt_text
from bagel.commands.progress import LABEL_CHARACTERS, short
from bagel.events import Result
from bagel.request import Request

STAGES = ("queue", "context", "text", "transfer", "denoise", "decode")
SERVED_STAGES = ("queue", "transfer")
"""Stages that exist only between services."""


def stats_table(requests: Sequence[Request], results: Sequence[Result]) -> str:
    """The table of --log-stats: seconds in each stage, visible tokens and Euler steps of each request."""
    stages = [s for s in STAGES if s not in SERVED_STAGES or any(s in result.timings for result in results)]
    rows = [["request", *(f"{stage} s" for stage in stages), "tokens", "steps", "prompt"]]
    for number, (request, result) in enumerate(zip(requests, results, strict=True), 1):
        seconds = [f"{result.timings[stage]:.3f}" if stage in result.timings else "-" for stage in stages]
        steps = str(request.image.steps - 1) if result.image else "-"
        rows.append(
            [str(number), *seconds, str(len(result.token_ids)), steps, short(prompt_text(request), LABEL_CHARACTERS)]
        )
    return _aligned(rows)


def profile_table(requests: Sequence[Request], results: Sequence[Result]) -> str:
    """The table of --enable-diffusion-pipeline-profiler: durations of the diffusion stages of each picture."""
    rows = [["picture", "size", "context s", "denoise s", "decode s", "steps", "steps/s"]]
    for number, (request, result) in enumerate(zip(requests, results, strict=True), 1):
        assert result.image is not None
        context, denoise, decode = (result.timings.get(stage, 0.0) for stage in ("context", "denoise", "decode"))
        size, steps = f"{result.image.width}x{result.image.height}", request.image.steps - 1
        seconds = [f"{duration:.3f}" for duration in (context, denoise, decode)]
        rows.append([str(number), size, *seconds, str(steps), f"{steps / denoise:.2f}" if denoise else "-"])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
