"""Print tables on the terminal, and write the same rows as JSON lines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bagel import __version__

Value = str | float | int | None
Row = Mapping[str, Value]

NOT_MEASURED = "not measured"


@dataclass
class Table:
    """Rows with the same columns. None stands for a value that this machine cannot measure."""

    name: str
    note: str
    rows: list[Row] = field(default_factory=list)
    failed: bool = False

    def add(self, **values: Value) -> None:
        self.rows.append(values)

    def render(self) -> str:
        """The table as aligned text, with three significant digits."""
        columns = list(self.rows[0]) if self.rows else []
        lines = [columns, *([_cell(row[name]) for name in columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        body = ["  ".join(_pad(text, width) for text, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([f"== {self.name}: {self.note}", *(line.rstrip() for line in body)])


def _cell(value: Value) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def _pad(text: str, width: int) -> str:
    numeric = not text.strip("0123456789.,+-e%")  # numbers are aligned to the right
    return text.rjust(width) if numeric else text.ljust(width)


def machine(device: torch.device) -> dict[str, Value]:
    """The machine on which the figures were measured."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bagel": __version__,
    }


def _cpu_name() -> str:
    """The processor's name from Linux, elsewhere from Python."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def write_json(path: Path, tables: Sequence[Table], on: Row) -> None:
    """Write one JSON object per line: first the machine, then every row with the name of its table."""
    lines = [{"table": "machine", **on}, *({"table": table.name, **row} for table in tables for row in table.rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
