"""Whole pictures at the client, through services whose DiT has one GPU and several."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL.Image import Image

from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.parallel.config import CFG_SIZES
from bagel.pipelines import BAGEL
from bench import peer
from bench.parallel_lab import MOST_ERROR, judged
from bench.parallel_ranks import failed
from bench.report import Row, Table, Value

ONE = "one GPU"
LARGE = "text-to-image 1024, 50 timesteps"
MOST_SECONDS = {4: 2.9, 8: 1.8}
"""Of LARGE in the fastest way, by the number of GPUs."""
START_S, PICTURE_S = 240.0, 180.0
"""Limits of a deployment's start and of a picture."""


@dataclass
class Answers:
    """What services answered: seconds and pictures of each case, in the order of the requests."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    pictures: dict[str, list[Image]] = field(default_factory=dict)

    def error(self, case: str, one: Answers) -> float:
        """The largest distance of a picture from one GPU's, relative to its distance from grey."""
        return max(_distance(a, b) for a, b in zip(self.pictures[case], one.pictures[case], strict=True))


def ways(ranks: int) -> dict[str, Mapping[str, int]]:
    """Settings of a DiT on so many GPUs: by the branches of guidance, by latents, and by both."""
    cfg = min(ranks, CFG_SIZES[-1])
    found: dict[str, Mapping[str, int]] = {
        ONE: {},
        f"cfg {cfg}": {"cfg_parallel_size": cfg},
        f"context {ranks}": {"context_parallel_size": ranks},
    }
    if ranks >= 4 and ranks % 2 == 0:
        found[f"context {ranks // 2} x cfg 2"] = {"context_parallel_size": ranks // 2, "cfg_parallel_size": 2}
    return found


def run(ranks: int, device: torch.device, checkpoint: Path | None) -> Iterator[Table]:
    """A table for each way, one GPU first, then the fastest. A way that fails is told, and the next one tried."""
    cases = peer.FULL if device.type == "cuda" else peer.SMALL
    found: dict[str, Answers] = {}
    with ExitStack() as stack:
        folder = checkpoint or peer.made(stack, device, tiny=device.type != "cuda")
        for name, sizes in ways(ranks).items():
            try:
                found[name] = _answers(sizes, folder, cases, device)
                yield _table(name, found[name], found.get(ONE), device)
            except Exception as error:
                traceback.print_exc()
                yield failed(f"pictures, {name}", error)
    if device.type == "cuda" and found and ranks in MOST_SECONDS:
        yield _fastest({name: median(each.seconds[LARGE]) for name, each in found.items()}, MOST_SECONDS[ranks])


def _answers(sizes: Mapping[str, int], folder: Path, cases: Sequence[peer.Case], device: torch.device) -> Answers:
    """Thinker and first rank share the first GPU."""
    config = load_deploy_config(shipped_deploy_config(BAGEL.model_type), **sizes)
    place = "auto" if device.type == "cuda" else device.type  # auto: the GPUs of the deploy file, for all ranks
    answers = Answers()
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, folder, logs=nowhere, init_timeout_s=START_S, engine="torch", device=place) as services,
        Client(services.address) as client,
    ):
        for case, seconds, picture in peer.answers(client, cases, timeout=PICTURE_S):
            answers.seconds.setdefault(case, []).append(seconds)
            answers.pictures.setdefault(case, []).append(picture)
    return answers


def _table(name: str, ours: Answers, one: Answers | None, device: torch.device) -> Table:
    """What a way took, and how far its pictures are from one GPU's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    note = f"at the client, medians of {peer.RUNS}; error: of pixels, relative to one GPU's picture"
    table, most = Table(f"parallel pictures, {name}", note), MOST_ERROR[dtype]
    for case in filter(None, ours.seconds):  # without the warm-ups
        seconds = median(ours.seconds[case])
        row: dict[str, Value] = {"case": case, "seconds": seconds, "times": None, "error": None}
        faults = {"no pictures of one GPU": one is None}
        if one is not None:
            row |= {"times": median(one.seconds[case]) / seconds, "error": (error := ours.error(case, one))}
            faults[f"error above {most}"] = not error <= most
        judged(table, row, faults)
    return table


def _fastest(seconds: Mapping[str, float], limit: float) -> Table:
    name = min(seconds, key=lambda each: seconds[each])
    row: Row = {"case": LARGE, "way": name, "seconds": seconds[name], "at_most": limit}
    return judged(Table("parallel pictures, fastest", "of all ways"), row, {f"above {limit} s": seconds[name] > limit})


def _distance(ours: Image, theirs: Image) -> float:
    a, b = (np.asarray(each.convert("RGB"), dtype=np.float64) - 127.5 for each in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
