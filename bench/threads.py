"""Why a small model uses one thread: the shipped model's pictures with one thread, and with one per core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch

from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.engine.local import BagelEngine
from bagel.prompts import TextPart
from bagel.request import Modality, resolve
from bench.report import Table
from bench.timing import compare

TOGETHER = (1, 2, 4)
STEPS = 21


def run(repeats: int) -> Iterator[Table]:
    """Draw 1, 2 and 4 pictures at once, interleaved; fails if one thread takes longer than all."""
    cores = os.cpu_count() or 1
    note = f"{NANO_NAME}, pictures of {STEPS} timesteps drawn together in one process, {cores} cores"
    table = Table("threads", f"{note}; threads wait as OMP_WAIT_POLICY says, PASSIVE in services")
    _, checkpoint = find_model(NANO_NAME)
    engine = BagelEngine.load(checkpoint)
    for together in TOGETHER:
        result = compare(_drawing(engine, together, 1), _drawing(engine, together, cores), repeats)
        low, high = result.spread
        table.add(
            case=f"{together} at once",
            one_ms=1e3 * result.ours_s,
            all_ms=1e3 * result.control_s,
            ratio=result.ratio,
            quartiles=f"{low:.2f} to {high:.2f}",
            cpu_ratio=result.cpu_ratio,
        )
        table.failed |= result.ratio > 1
    yield table


def _drawing(engine: BagelEngine, together: int, threads: int) -> Callable[[], None]:
    prompt = (TextPart("a large red circle"),)
    requests = [resolve(Modality.TEXT2IMG, prompt, {"seed": seed, "steps": STEPS}) for seed in range(together)]

    def draw() -> None:
        torch.set_num_threads(threads)  # on each call, since the other side sets it too
        engine.generate(requests)

    return draw
