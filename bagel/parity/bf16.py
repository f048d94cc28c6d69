"""The bfloat16 set: our bfloat16 must lie no farther from the float32 recordings than the reference's own does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.engine.local import BagelEngine
from bagel.parallel.groups import Groups
from bagel.parity.golden import Case, Golden
from bagel.parity.report import Comparison, Judge

FLOAT32_NOISE = 1e-5
"""Relative distance that float32 alone makes: the autoencoder is float32 on both sides."""
SLACK = 1.001
"""The recorded distances are rounded to four digits."""

Run = Callable[[BagelEngine, Case, str, Callable[[], Comparison]], Comparison]
"""Repeats a case through an engine, under a name, and fills the comparison that is made for it."""


@dataclass
class Bf16Comparison(Comparison):
    """Compares pictures by their mean distance, which must not exceed the reference's."""

    recorded: Mapping[str, Path] = field(default_factory=dict)

    def picture(self, name: str, ours: Image.Image, path: Path) -> None:
        self.compared.add(path.name)
        # int16, as differences of u8 may be negative.
        wanted = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
        reference = np.asarray(Image.open(self.recorded[name]).convert("RGB"), dtype=np.int16)
        distance = float(np.abs(np.asarray(ours, dtype=np.int16) - wanted).mean())
        allowed = float(np.abs(reference - wanted).mean())
        self.errors[f"u8 mean {name}"] = distance
        if distance > allowed * SLACK + 1e-3:
            self.failures.append(
                f"{name}: mean distance {distance:.3f} u8 steps, the reference's bfloat16 has {allowed:.3f}"
            )


def compare_bf16(golden: Golden, device: str, run: Run, groups: Groups) -> Iterator[Comparison]:
    """Every case of bf16/, run in bfloat16 and judged against its float32 twin."""
    cases = golden.cases("bf16")
    # Without cases no second model is loaded.
    if not cases:
        return
    engine = BagelEngine.load(golden.checkpoint, dtype=torch.bfloat16, device=device, groups=groups)
    for case in cases:
        # Both bfloat16 runs, ours and the reference's, are measured from the float32 one.
        twin = Case(golden.root, golden.root / "fp32", case.name)
        yield run(engine, twin, f"bf16/{case.name}", partial(_report, golden, case, twin))


def _report(golden: Golden, case: Case, twin: Case) -> Comparison:
    distances = golden.bf16_distances[case.name]
    wanted = {name: twin.tensors[name] for name in case.tensors}
    report = Bf16Comparison(f"bf16/{case.name}", wanted, within(distances), recorded=case.pictures)
    report.require(*case.data["tensors"], *distances)
    return report


def within(distances: Mapping[str, Any]) -> Judge:
    """Fail beyond the relative L2 distance that the reference's bfloat16 has."""

    def judge(name: str, ours: Tensor, wanted: Tensor) -> str | None:
        distance = float((ours - wanted).norm() / wanted.norm().clamp(min=1e-12))
        allowed = float(distances[name]["rel_l2"])
        if distance <= allowed * SLACK + FLOAT32_NOISE:
            return None
        return f"{name}: relative L2 {distance:.3g} from float32, the reference's bfloat16 has {allowed:.3g}"

    return judge
