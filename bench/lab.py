"""The shared parts of the GPU benchmark's sections: sizes, one model at a time, peak memory, and the summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bagel.checkpoint.config import BAGEL_7B_MOT, ModelConfig
from bagel.checkpoint.roles import Role
from bagel.model.bagel import Bagel
from bagel.model.weights import random_model
from bench.cases import PROMPT
from bench.meter import Meter, copy_gb_per_s, matmul_tflops
from bench.models import TINY
from bench.report import Table

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure. sides: of pictures, in pixels; contexts: tokens of gen's context; prefills: text tokens.

    steps: timesteps of the whole picture; reply: tokens to decode after `past` tokens, for one text and for `batch`.
    """

    config: ModelConfig
    dtype: torch.dtype
    matrix: int
    copy_bytes: int
    sides: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    steps: int
    past: int
    reply: int
    batch: int


FULL = Sizes(
    config=BAGEL_7B_MOT,
    dtype=torch.bfloat16,
    matrix=8192,
    copy_bytes=4 * GIB,
    sides=(512, 1024),
    contexts=(PROMPT, 9000),
    prefills=(512, 8192),
    steps=50,
    past=1000,
    reply=64,
    batch=16,
)
SMALL = Sizes(
    config=TINY,
    dtype=torch.float32,
    matrix=256,
    copy_bytes=2**20,
    sides=(64, 128),
    contexts=(PROMPT, 300),
    prefills=(16, 64),
    steps=20,
    past=40,
    reply=4,
    batch=3,
)
"""For --tiny: the same code in seconds. On a GPU, float32 takes the attention that loops over rows."""


class Lab:
    """One device, its ceilings, and the two tables to which all sections add."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.sizes, self.meter = sizes, Meter(device)
        self.memory = Table("gpu memory", "GiB of tensors at the peak; working: all that is not weights")
        self.summary = Table("gpu summary", "the figures in short")
        self.weights = 0
        self.matrix_tflops: float | None = None
        self.copy_gb_s: float | None = None

    def measure_ceilings(self) -> Table:
        """Measure the device's own rates, with which this run compares its results."""
        sizes, meter = self.sizes, self.meter
        self.matrix_tflops = matmul_tflops(meter, sizes.matrix, sizes.dtype)
        self.copy_gb_s = copy_gb_per_s(meter, sizes.copy_bytes)
        table = Table("gpu ceilings", "a matrix product on random data; a device-to-device copy, read plus written")
        product = f"{sizes.matrix} cubed, {sizes.dtype}"
        table.add(product=product, tflops=self.matrix_tflops, copy_gb_s=self.copy_gb_s)
        self.headline("matrix peak", self.matrix_tflops, "TFLOP/s")
        return table

    @contextmanager
    def model(self, role: Role) -> Iterator[Bagel]:
        """A model with random weights, the only one on the device."""
        self.meter.release()  # the previous section's model
        before = self.meter.allocated()
        model = random_model(self.sizes.config, role, dtype=self.sizes.dtype, device=self.meter.device, seed=0)
        self.weights = self.meter.allocated() - before
        yield model

    @contextmanager
    def track(self, role: Role, work: str) -> Iterator[None]:
        """Record the peak memory of the block, divided into the model's weights and the rest."""
        self.meter.release()
        self.meter.reset_peak()
        yield
        peak = self.meter.peak()
        weights = None if peak is None else self.weights / GIB
        working = None if peak is None else (peak - self.weights) / GIB
        self.memory.add(role=str(role), work=work, weights=weights, working=working)

    def headline(self, name: str, value: float | None, unit: str) -> None:
        self.summary.add(what=name, value=value, unit=unit)

    def rate(self, flop: int, ms: float | None) -> dict[str, float | None]:
        """The columns tflops and percent_of_peak for work of `flop` operations that took `ms`."""
        tflops = None if ms is None else flop / ms / 1e9
        percent = None if tflops is None or self.matrix_tflops is None else 100 * tflops / self.matrix_tflops
        return {"tflops": tflops, "percent_of_peak": percent}
