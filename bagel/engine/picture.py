"""A picture to draw, and the contexts that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from bagel.checkpoint.limits import row_kv_tokens
from bagel.engine.commands import PlacedContext
from bagel.model.attention import KvSlab
from bagel.model.flow import guided_steps, timesteps
from bagel.prompts import BranchName
from bagel.request import ImageSettings


class ContextKv(Protocol):
    """A context that a picture is drawn from: engine.context.Context, or one whose K/V arrive later."""

    @property
    def digest(self) -> bytes: ...

    @property
    def length(self) -> int: ...

    @property
    def rope(self) -> int: ...

    def copy_to(self, slab: KvSlab, start: int) -> None: ...


class ArrivingContext:
    """A context whose K/V are written to the slab page by page, after it has its place there."""

    def __init__(self, placed: PlacedContext) -> None:
        self.digest, self.length, self.rope = placed.digest, placed.length, placed.rope

    def copy_to(self, slab: KvSlab, start: int) -> None:
        """Nothing is there yet."""


@dataclass(frozen=True)
class Picture:
    """A picture to draw.

    grid: (rows, columns) of latent tokens; noise: [rows * columns, features] float32, what it starts from;
    contexts: by branch; every branch that `needed_branches` names must be there.
    times, deltas, guided: of each Euler step the time where it begins, its length, and whether guidance applies.
    """

    settings: ImageSettings
    grid: tuple[int, int]
    noise: Tensor
    contexts: Mapping[BranchName, ContextKv]
    times: list[float] = field(init=False)
    deltas: list[float] = field(init=False)
    guided: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        # N times are N - 1 steps: the last time is where the last step ends.
        times = timesteps(self.settings.steps, self.settings.timestep_shift)
        object.__setattr__(self, "times", times[:-1].tolist())
        object.__setattr__(self, "deltas", (times[:-1] - times[1:]).tolist())
        object.__setattr__(self, "guided", guided_steps(times[:-1], self.settings.cfg_interval))

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def steps(self) -> int:
        return len(self.times)

    def distinct(self) -> dict[bytes, ContextKv]:
        """Its contexts by digest: equal branches share one row."""
        return {context.digest: context for context in self.contexts.values()}

    def kv_tokens(self, padded: int) -> list[int]:
        """Tokens of K/V of each row whose latents are padded to so many."""
        return [row_kv_tokens(context.length, padded) for context in self.distinct().values()]
