"""One DiT on several GPUs beside one of them: steps, weights, the autoencoder's tiles and whole pictures.

Rank i is on GPU i, at full size with random weights in bfloat16. On a CPU the same code runs on a tiny model in
float32, which checks that results are right; times and limits count on GPUs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from bagel.checkpoint.config import BAGEL_7B_MOT, LlmConfig
from bagel.errors import ConfigError
from bagel.parallel.config import CFG_SIZES
from bagel.parallel.mesh import Mesh
from bench import parallel_pictures, parallel_steps, parallel_vae
from bench.models import DIVISIBLE
from bench.parallel_ranks import Part, failed
from bench.parallel_ranks import run as run_part
from bench.report import Table

FEWEST = 2
Tables = Callable[[], Iterator[Table]]


def run(device: torch.device, ranks: int | None, only: Sequence[str], checkpoint: Path | None) -> Iterator[Table]:
    """Measure the named parts, or all; yields their tables as they come.

    ranks: as many as GPUs if None. checkpoint: of whole pictures; else one of random weights is made, and removed.
    Raises ConfigError for ranks that are not there, and for parts that do not exist or need more ranks.
    """
    ranks = _ranks(device, ranks)
    parts = _chosen(_parts(device, ranks, checkpoint), only, ranks)
    return (table for part in parts for table in part())


def _ranks(device: torch.device, asked: int | None) -> int:
    """How many ranks there are to be; ConfigError unless there is a GPU for each, and another one to compare with."""
    if asked is not None and asked < FEWEST:
        raise ConfigError(f"--ranks is {asked}; several are compared with one, give {FEWEST} or more")
    if device.type != "cuda":
        return asked or FEWEST
    if device.index:
        raise ConfigError(f"--device is {device}; rank i takes GPU i, give --device cuda")
    there = torch.cuda.device_count()
    if there < FEWEST:
        remedy = "run this on two or more, or check the code with --device cpu"
        raise ConfigError(f"PyTorch sees {there} GPU{'s' if there != 1 else ''}; {remedy}")
    if asked is not None and asked > there:
        raise ConfigError(f"--ranks is {asked}, and PyTorch sees {there} GPUs; give at most --ranks {there}")
    return asked or there


def _chosen(parts: dict[str, list[Tables]], only: Sequence[str], ranks: int) -> list[Tables]:
    for name in only:
        if name not in parts:
            raise ConfigError(f"--only {name!r} names no part; the parts are: {', '.join(parts)}")
        if not parts[name]:
            raise ConfigError(f"--only {name} needs an even number of ranks from 4 on; --ranks is {ranks}")
    return [each for name, several in parts.items() if not only or name in only for each in several]


def _parts(device: torch.device, ranks: int, checkpoint: Path | None) -> dict[str, list[Tables]]:
    """All parts by name, in the order in which they run."""
    parts: dict[str, list[Tables]] = {
        name: [partial(run_part, part, device.type) for part in each] for name, each in plan(device, ranks)
    }
    return parts | {"pictures": [partial(_pictures, ranks, device, checkpoint)]}


def plan(device: torch.device, ranks: int) -> Iterator[tuple[str, list[Part]]]:
    """What is measured in processes of ranks, by the name of its part."""
    cfg, half, even = min(ranks, CFG_SIZES[-1]), ranks // 2, ranks >= 4 and ranks % 2 == 0
    tp, steps = tensor_ranks((BAGEL_7B_MOT if device.type == "cuda" else DIVISIBLE).llm, ranks), parallel_steps
    yield "links", [Part("links", Mesh(data=ranks), steps.links, 60)]
    yield "cfg", [Part(f"cfg {cfg}", Mesh(cfg=cfg), steps.whole, 120)]
    yield "context", [Part(f"context {ranks}", Mesh(context=ranks), steps.whole, 120)]
    mesh = Mesh(cfg=2, context=max(half, 1))
    yield "mixed", [Part(f"context {half} x cfg 2", mesh, steps.whole, 120)] if even else []
    yield "tensor", [Part(f"tensor {tp}", Mesh(tp=tp), steps.tensor, 150)]
    sharded = [Part(f"hsdp {ranks}", Mesh(data=ranks), steps.hsdp, 180, weight_ranks=ranks)]
    if even:
        sharded.append(Part(f"hsdp {half} x 2", Mesh(data=ranks), steps.hsdp, 180, weight_ranks=half))
    yield "hsdp", sharded
    yield "vae", [Part(f"vae {ranks}", Mesh(data=ranks), parallel_vae.vae, 120, vae_ranks=ranks)]


def tensor_ranks(llm: LlmConfig, most: int) -> int:
    """The largest number of ranks, up to so many, that divides a decoder."""
    for ranks in range(most, 1, -1):
        try:
            Mesh(tp=ranks).rank(0).decoder(llm)
        except ConfigError:
            continue
        return ranks
    return 1


def _pictures(ranks: int, device: torch.device, checkpoint: Path | None) -> Iterator[Table]:
    try:
        yield from parallel_pictures.run(ranks, device, checkpoint)
    except Exception as error:  # without a checkpoint, say
        yield failed("pictures", error)
