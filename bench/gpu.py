"""The GPU benchmark: the full-size model with random weights on one H100 or H200 (see README.md).

On a CPU, with --tiny, the same code runs, and figures that need a CUDA device read "not measured".
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

import torch

from bagel.errors import ConfigError
from bench.gpu_drawing import denoise, full, profile
from bench.gpu_previews import previews
from bench.gpu_reading import context, understand
from bench.gpu_switches import switches
from bench.lab import FULL, SMALL, Lab
from bench.report import Table

SECTIONS: dict[str, Callable[[Lab], Iterator[Table]]] = {
    "denoise": denoise,
    "switches": switches,
    "previews": previews,
    "understand": understand,
    "context": context,
    "full": full,
    "profile": profile,
}


def run(device: torch.device, only: str, *, tiny: bool) -> Iterator[Table]:
    """Measure every section whose name contains `only`; yields their tables, then memory and summary."""
    chosen = {name: section for name, section in SECTIONS.items() if only in name}
    if not chosen:
        raise ConfigError(f"--only {only!r} names no section; the sections are: {', '.join(SECTIONS)}")
    lab = Lab(device, SMALL if tiny else FULL)
    yield lab.measure_ceilings()
    for name, section in chosen.items():
        try:
            yield from section(lab)
        except Exception as error:  # time on a GPU is expensive, so the other sections still run
            traceback.print_exc()
            reason = (str(error) or repr(error)).splitlines()[0]
            yield Table(f"gpu {name} FAILED", reason, failed=True)
    yield lab.memory
    yield lab.summary
