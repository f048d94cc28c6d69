"""How far a quantised model lies from the float32 recordings, beside bfloat16. A report: nothing passes or fails."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.engine.local import BagelEngine
from bagel.parity.cases import runner
from bagel.parity.golden import Case, Golden
from bagel.parity.report import NAME_COLUMNS, Comparison

BF16 = "bfloat16"
REFERENCE = "the reference's bfloat16"


@dataclass
class Distances(Comparison):
    """Relative L2 distances of tensors, mean distances of pictures in steps of 255, and whether texts are equal."""

    relative: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case) -> Distances:
        """For a case; nothing in it is judged."""
        relative: dict[str, float] = {}

        def note(name: str, ours: Tensor, wanted: Tensor) -> None:
            relative[name] = float((ours - wanted).norm() / wanted.norm().clamp(min=1e-12))

        return cls(case.name, case.tensors, note, relative=relative)

    def picture(self, name: str, ours: Image.Image, path: Path) -> None:
        self.compared.add(path.name)
        wanted = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
        self.pictures[name] = float(np.abs(np.asarray(ours, dtype=np.int16) - wanted).mean())

    def summary(self) -> dict[str, Any]:
        """What a line says of it."""
        values = sorted(self.relative.values())
        return {
            "tensors": len(values),
            "median": _rounded(median(values)) if values else None,
            "largest": _rounded(values[-1]) if values else None,
            "pictures": {name: _rounded(value) for name, value in self.pictures.items()},
            # Another token of a greedy text, and what follows from it.
            "different": len(self.failures),
        }


def compare_formats(golden: Golden, device: str, quantization: str) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Of every recorded case its summaries by number format."""
    run = runner(golden)
    plain, quantised = (
        BagelEngine.load(golden.checkpoint, dtype=torch.bfloat16, device=device, quantization=each)
        for each in (None, quantization)
    )
    for case in golden.cases("fp32"):
        if case.name == "components":
            continue  # nothing of it is quantised
        found = {}
        for name, engine in ((BF16, plain), (quantization, quantised)):
            report = run(engine, case, case.name, partial(Distances.of, case))
            if isinstance(report, Distances) and report.relative:
                found[name] = report.summary()
        if case.name in golden.bf16_distances:
            told = golden.bf16_distances[case.name].values()
            values = [float(each["rel_l2"]) for each in told if isinstance(each, dict) and "rel_l2" in each]
            found[REFERENCE] = {
                "tensors": len(values),
                "median": _rounded(median(values)),
                "largest": _rounded(max(values)),
            }
        if found:
            yield case.name, found


def line(name: str, found: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> str:
    """A case for a terminal, or as an object."""
    if as_json:
        return json.dumps({"case": name, "distance": found})
    return f"{name:<{NAME_COLUMNS}} " + "; ".join(f"{each} {_words(summary)}" for each, summary in found.items())


def _words(summary: Mapping[str, Any]) -> str:
    pictures = "".join(f", picture {value:g} u8" for value in summary.get("pictures", {}).values())
    different = ", other tokens" if summary.get("different") else ""
    return f"{summary['median']:g} (largest {summary['largest']:g}{pictures}{different})"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
