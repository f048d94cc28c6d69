"""Tables of text, and that of --enable-diffusion-pipeline-profiler."""

from __future__ import annotations

from collections.abc import Sequence

from bagel.events import Result
from bagel.telemetry.stages import steps_of

NOTHING = "-"
LABEL_CHARACTERS = 40
"""Longest part of a prompt that names its request."""


def profile_table(results: Sequence[Result]) -> str:
    """The table of --enable-diffusion-pipeline-profiler: durations of the diffusion stages of each picture.

    They are the device's own; share: of their sum.
    """
    rows = [["picture", "size", "stage", "seconds", "ms/step", "share"]]
    for number, result in enumerate(results, 1):
        if result.image is None:
            continue
        size, total = f"{result.image.width}x{result.image.height}", sum(result.profile.values())
        for stage, seconds in result.profile.items():
            steps = steps_of(stage)
            each = NOTHING if steps is None else f"{1e3 * seconds / steps:.1f}"
            rows.append([str(number), size, stage, f"{seconds:.3f}", each, f"{seconds / total:.0%}"])
    return aligned(rows, left=(1, 2))


def short(text: str, characters: int) -> str:
    """A text as one line of at most so many characters, without anything that moves a terminal's cursor."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
    return line if len(line) <= characters else line[: characters - 1] + "…"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows of cells as lines; the columns with these numbers begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        padded = (cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in cells)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
