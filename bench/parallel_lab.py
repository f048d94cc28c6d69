"""What the ranks of `python -m bench parallel` share: times of all at once, pictures on ranks, and what is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from bagel.checkpoint.roles import Role
from bagel.engine.sampler import Canvas
from bagel.model.bagel import Bagel
from bagel.model.weights import random_model
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.prompts import BranchName
from bench import cases
from bench.lab import FULL, SMALL
from bench.meter import Meter, Work
from bench.models import DIVISIBLE
from bench.report import Row, Table

CONTEXT = 64
"""Tokens of a picture's context."""
ROUNDS = 3
WARM_UPS = 2
MOST_ERROR = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Of velocities, by the model's type: in bfloat16 rows that are computed apart are about 0.01 from those together."""

Velocities = Mapping[BranchName, Tensor]


class RankLab:
    """One rank of a part. mode: what its rows are called, and its limits are found by."""

    def __init__(self, mode: str, groups: Groups, device: torch.device) -> None:
        self.mode, self.groups, self.device = mode, groups, device
        self.meter = Meter(device)
        self.sizes = FULL if self.meter.cuda else replace(SMALL, config=DIVISIBLE)
        self.small, self.large = self.sizes.sides

    def model(self) -> Bagel:
        """The whole model, the same on every rank."""
        sizes = self.sizes
        return random_model(sizes.config, Role.DENOISE, dtype=sizes.dtype, device=self.device, seed=0)

    def ms(self, work: Work, repeats: int = 6) -> float | None:
        """The median time of one call, on all ranks at once; on a CPU the work runs once."""
        for _ in range(WARM_UPS if self.meter.cuda else 0):
            work()
        self.groups.world.add_up(torch.zeros(1, device=self.device))
        return self.meter.median_ms(work, warmup=0, repeats=repeats)

    def in_turns(self, *works: Work, repeats: int = 6) -> list[float | None]:
        """`ms` of each piece of work: the middle of several rounds, as a GPU that has got warm is slower."""
        rounds = [[self.ms(work, repeats) for work in works] for _ in range(ROUNDS if self.meter.cuda else 1)]
        return [_middle(each) for each in zip(*rounds, strict=True)]

    def canvas(self, model: Bagel, side: int, branches: int, groups: Groups = UNDIVIDED) -> Canvas:
        """A picture on contexts that are the same on every rank; a rank has the K/V of its heads."""
        torch.manual_seed(0)
        return cases.draw(model, side, cases.branch_contexts(model, CONTEXT, branches), groups=groups)

    def all_true(self, mine: bool) -> bool:
        """Whether something is so on every rank; all ranks ask at once."""
        world = self.groups.world
        return int(world.add_up(torch.tensor([int(mine)], device=self.device))) == world.size

    def same_everywhere(self, velocities: Velocities) -> bool:
        """Whether all ranks have these bits; all ranks ask at once."""
        every = self.groups.world.gather(torch.stack(list(velocities.values())))
        return all(torch.equal(each, every[0]) for each in every[1:])

    def slowest(self, ms: float | None) -> float | None:
        """The longest of the ranks' times for the same work, whose pace all keep; all ask at once."""
        if ms is None:
            return None
        return max(float(each) for each in self.groups.world.gather(torch.tensor([ms], device=self.device)))

    def limit(self, limit: float | None) -> float | None:
        """A limit of speed or memory, which counts on GPUs alone."""
        return limit if self.meter.cuda else None


def velocities(canvas: Canvas) -> Velocities:
    """Those of the first step's branches."""
    drawing = canvas.drawings[0]
    # Copies, as a graph's next replay writes to the same memory.
    return {name: each.clone() for name, each in canvas.velocities({drawing: drawing.branches()})[drawing].items()}


def equal(ours: Velocities, wanted: Velocities) -> bool:
    """Whether they are so to the bit."""
    return all(torch.equal(ours[name], wanted[name]) for name in wanted)


def distance(ours: Velocities, wanted: Velocities) -> float:
    """The largest relative distance of a branch's velocity; infinite if one is not finite."""
    distances = [float((ours[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted]
    return max(distances) if all(map(math.isfinite, distances)) else math.inf


def judged(table: Table, row: Row, faults: Mapping[str, bool]) -> Table:
    """The table with one more row, whose last column says what of it is wrong. faults: what there may be, and is."""
    found = [name for name, there in faults.items() if there]
    table.add(**row, verdict="; ".join(found) or "ok")
    table.failed = table.failed or bool(found)
    return table


def below(value: float | None, limit: float | None) -> bool:
    """Whether a figure that was measured misses a limit that there is."""
    return value is not None and limit is not None and value < limit


def _middle(values: Sequence[float | None]) -> float | None:
    measured = [each for each in values if each is not None]
    return median(measured) if measured else None
