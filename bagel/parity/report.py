"""What was compared with what, and how far apart it lies."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# An error within the tolerance can move a value across a border between two steps.
LARGEST_U8_STEP = 1
NAME_COLUMNS = 30

Judge = Callable[[str, Tensor, Tensor], str | None]
"""(name, ours, wanted), both float32 on the CPU -> why it fails, or None."""


def absolute(tolerance: float) -> Judge:
    """Fail beyond an absolute error."""

    def judge(name: str, ours: Tensor, wanted: Tensor) -> str | None:
        error = float((ours - wanted).abs().max())
        return None if error <= tolerance else f"{name}: off by {error:.3g}, allowed {tolerance:g}"

    return judge


def family(name: str) -> str:
    """Name of a tensor without its layer, turn, image or step number."""
    name = re.sub(r"\.\d+\.[kv]$", "", name)
    return re.sub(r"(layer|turn|image|step)\d+", r"\1", name)


@dataclass
class Comparison:
    """Everything compared in one case."""

    case: str
    tensors: Mapping[str, Tensor]
    judge: Judge
    errors: dict[str, float] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)

    def require(self, *names: str) -> None:
        """Fail for tensors that every case of this kind records and this one lacks."""
        self.failures += [f"{name}: not recorded" for name in names if name not in self.tensors]

    def tensor(self, name: str, ours: Callable[[], Tensor] | Tensor) -> None:
        """Compare a tensor if the case has it; integers exactly, the rest as the judge says."""
        if name not in self.tensors:
            return
        wanted = self.tensors[name]
        value = (ours() if callable(ours) else ours).detach().cpu()
        self.compared.add(name)
        if value.shape != wanted.shape:
            self.failures.append(f"{name}: shape {list(value.shape)}, wanted {list(wanted.shape)}")
        elif not wanted.is_floating_point():
            self.equal(name, value.tolist(), wanted.tolist())
        else:
            value, wanted = value.float(), wanted.float()
            error = float((value - wanted).abs().max()) if value.numel() else 0.0
            group = family(name)
            self.errors[group] = max(self.errors.get(group, 0.0), error)
            if not torch.isfinite(value).all():
                self.failures.append(f"{name}: holds values that are not finite")
            elif (reason := self.judge(name, value, wanted)) is not None:
                self.failures.append(reason)

    def input(self, name: str) -> Tensor:
        """A recorded tensor that is an input; it counts as used."""
        self.compared.add(name)
        return self.tensors[name]

    def equal(self, name: str, ours: Any, wanted: Any) -> None:
        """Compare ids, texts, lengths, positions, sizes: exactly."""
        self.exact.append(family(name))
        if ours != wanted:
            self.failures.append(f"{name}: {_short(ours)}, wanted {_short(wanted)}")

    def picture(self, name: str, ours: Image.Image, path: Path) -> None:
        """Compare a u8 picture; one step a value is allowed."""
        self.compared.add(path.name)
        wanted = Image.open(path).convert("RGB")
        if ours.size != wanted.size:
            self.failures.append(f"{name}: {ours.size}, wanted {wanted.size}")
            return
        # int16, as differences of u8 may be negative.
        difference = np.abs(np.asarray(ours, dtype=np.int16) - np.asarray(wanted, dtype=np.int16))
        self.errors[f"u8 {name}"] = float(difference.max())
        if difference.max() > LARGEST_U8_STEP:
            self.failures.append(f"{name}: off by {difference.max()} u8 steps, allowed {LARGEST_U8_STEP}")

    def finish(self, promised: Iterable[str]) -> None:
        """Fail for every tensor and file that is recorded or promised and that nothing was compared with."""
        left = sorted({*self.tensors, *promised} - self.compared)
        if left:
            self.failures.append(f"not compared: {', '.join(left)}")

    def line(self, seconds: float) -> str:
        """One line for a terminal: the largest error of a tensor, or what is wrong, cut to the width."""
        # Errors of pictures are in another unit.
        worst = max((error for name, error in self.errors.items() if not name.startswith("u8 ")), default=0.0)
        what = f"WRONG  {'; '.join(self.failures)}" if self.failures else f"ok     largest error {worst:.1e}"
        line = f"{self.case:<{NAME_COLUMNS}} {seconds:6.1f} s  {what}"
        columns = shutil.get_terminal_size().columns
        return line if len(line) <= columns else f"{line[: columns - 1]}…"

    def as_json(self, seconds: float) -> str:
        """One line of JSON, with everything."""
        return json.dumps(
            {
                "case": self.case,
                "seconds": round(seconds, 2),
                "ok": not self.failures,
                "max_abs_error": {name: float(f"{error:.3g}") for name, error in sorted(self.errors.items())},
                "equal": sorted(set(self.exact)),
                "failures": self.failures,
            }
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
