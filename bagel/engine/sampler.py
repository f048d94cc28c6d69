"""Drawing pictures: Euler steps over a batch of pictures, each with one to three branches of guidance.

Buffers are static. Each branch owns an interval of one K/V slab, [context | latents]: its context is written once,
a step writes only the rows of its latents. Equal branches of a picture share one row. Within a step the host
never waits for the device; it runs at most one step ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from bagel.checkpoint.limits import row_kv_tokens
from bagel.engine.clock import Moment, mark, seconds_between
from bagel.engine.layout import latent_rows
from bagel.engine.slab import SharedSlab
from bagel.model.attention import KvSlab, Rows, upload
from bagel.model.bagel import Bagel
from bagel.model.flow import guide, guided_steps, guiding_branches, latent_unpatchify, timesteps
from bagel.model.layers import grid_position_ids
from bagel.prompts import BranchName
from bagel.request import ImageSettings

Velocities = Mapping[BranchName, Tensor]
OnVelocity = Callable[[int, int, Velocities, Tensor], None]
"""Called with (picture, step, velocities by branch, guided velocity), each velocity [tokens, features] float32."""


class ContextKv(Protocol):
    """A context that a picture is drawn from: engine.context.Context, or one whose K/V land later."""

    @property
    def digest(self) -> bytes: ...

    @property
    def length(self) -> int: ...

    @property
    def rope(self) -> int: ...

    def copy_to(self, slab: KvSlab, start: int) -> None: ...


@dataclass
class Picture:
    """One picture to draw.

    grid: (rows, columns) of latent tokens; noise: [rows * columns, features] float32, what it starts from;
    contexts: by branch; every branch that `needed_branches` names must be there.
    """

    settings: ImageSettings
    grid: tuple[int, int]
    noise: Tensor
    contexts: Mapping[BranchName, ContextKv]
    step: int = 0
    times: list[float] = field(init=False)
    deltas: list[float] = field(init=False)
    guided: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        times = timesteps(self.settings.steps, self.settings.timestep_shift)
        self.times = times[:-1].tolist()
        self.deltas = (times[:-1] - times[1:]).tolist()
        self.guided = guided_steps(times[:-1], self.settings.cfg_interval)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def distinct(self) -> dict[bytes, ContextKv]:
        """Its contexts by digest: equal branches share one row."""
        return {context.digest: context for context in self.contexts.values()}

    def kv_tokens(self, padded: int) -> list[int]:
        """Tokens of K/V of each row whose latents are padded to so many."""
        return [row_kv_tokens(context.length, padded) for context in self.distinct().values()]

    def branches(self) -> frozenset[BranchName]:
        """Branches that the next step runs."""
        guiding = guiding_branches(self.settings) if self.guided[self.step] else frozenset()
        return frozenset({BranchName.GEN}) | guiding


@dataclass(frozen=True)
class _Row:
    """One distinct context of one picture and where its K/V lie."""

    picture: int
    context: ContextKv
    start: int


@dataclass(frozen=True)
class _Plan:
    """The layout of a step. position_ids are on the device."""

    rows: Rows
    pictures: tuple[int, ...]
    position_ids: Tensor


class Canvas:
    """Pictures being drawn together: their latents, their K/V, and the steps. They join and leave between steps.

    All fit one bucket: `padded` latents, at least as many as each has.
    """

    def __init__(self, model: Bagel, pictures: Sequence[Picture], padded: int, space: SharedSlab | None = None) -> None:
        """The first pictures are numbered from 0 in their order. space: where their K/V go, else one of their own."""
        self.model, self.padded = model, padded
        self.pictures: dict[int, Picture] = {}
        self._added = count()
        self._rows: dict[int, _Row] = {}
        self._rows_made = count()
        self._row_of: dict[tuple[int, BranchName], int] = {}
        self._x: dict[int, Tensor] = {}
        self._position_ids: dict[int, Tensor] = {}
        self._delimiters: Tensor = model.delimiter_embeddings()
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._space = space or SharedSlab(
            model.kv_shape,
            dtype=model.dtype,
            device=model.device,
            read_ahead=model.language_model.backend.read_ahead,
            lengths=[length for picture in pictures for length in picture.kv_tokens(padded)],
        )
        for picture in pictures:
            self.add(picture)

    @property
    def slab(self) -> KvSlab:
        """K/V of all pictures; in a space that grows, another one after `add`."""
        return self._space.slab

    @torch.inference_mode()
    def add(self, picture: Picture) -> int:
        """Let a picture take part; its number. Its contexts are written to the slab.

        All or nothing: a picture that memory runs out for leaves no trace.
        """
        if picture.tokens > self.padded:
            raise ValueError(f"a picture of {picture.tokens} latents does not fit a bucket of {self.padded}")
        device = self.model.device
        x = torch.zeros(self.padded, self.model.config.latent_features, device=device)
        x[: picture.tokens] = picture.noise.to(device)
        position_ids = self._padded_ids(picture).to(device)
        distinct = picture.distinct()
        starts = self._place_contexts(list(distinct.values()), picture.kv_tokens(self.padded))
        # From here on nothing is allocated on the device, so nothing fails half-way.
        number, rows = next(self._added), {}
        for (digest, context), start in zip(distinct.items(), starts, strict=True):
            rows[digest] = next(self._rows_made)
            self._rows[rows[digest]] = _Row(number, context, start)
        for name, context in picture.contexts.items():
            self._row_of[number, name] = rows[context.digest]
        self.pictures[number], self._x[number], self._position_ids[number] = picture, x, position_ids
        return number

    def _place_contexts(self, contexts: Sequence[ContextKv], rooms: Sequence[int]) -> list[int]:
        """Write contexts to the slab, in rooms that hold their latents too; where each begins."""
        starts = self._space.take_all(rooms)
        try:
            for context, start in zip(contexts, starts, strict=True):
                context.copy_to(self.slab, start)
        except BaseException:
            for start in starts:
                self._space.give(start)
            raise
        return starts

    def remove(self, number: int) -> None:
        """Let a picture leave."""
        left = {row for row, entry in self._rows.items() if entry.picture == number}
        for row in left:
            self._space.give(self._rows.pop(row).start)
        self._row_of = {key: row for key, row in self._row_of.items() if row not in left}
        self._plans = {rows: plan for rows, plan in self._plans.items() if left.isdisjoint(rows)}
        for entries in (self.pictures, self._x, self._position_ids):
            entries.pop(number)

    def place(self, number: int, branch: BranchName) -> int:
        """Where in the slab a branch's context begins."""
        return self._rows[self._row_of[number, branch]].start

    def latents(self, number: int) -> Tensor:
        """Latent tokens of a picture now, [tokens, features] float32."""
        return self._x[number][: self.pictures[number].tokens]

    @torch.inference_mode()
    def step(self, active: Sequence[int], on_velocity: OnVelocity | None = None) -> None:
        """One Euler step of each of the pictures `active`, in one forward."""
        wanted = {i: self.pictures[i].branches() for i in active}
        velocities = self.velocities(wanted)
        for i in active:
            picture = self.pictures[i]
            guided = guide(velocities[i], picture.settings)
            if on_velocity is not None:
                on_velocity(i, picture.step, velocities[i], guided)
            self.latents(i).sub_(guided * picture.deltas[picture.step])
            picture.step += 1

    @torch.inference_mode()
    def velocities(self, wanted: Mapping[int, frozenset[BranchName]]) -> dict[int, dict[BranchName, Tensor]]:
        """Velocities of the given branches of the given pictures at their present step."""
        names = [(i, name) for i, branches in wanted.items() for name in sorted(branches)]
        rows = sorted({self._row_of[key] for key in names})
        plan = self._plan(tuple(rows))
        times = [self.pictures[i].times[self.pictures[i].step] for i in plan.pictures]
        t = upload(times, torch.float32, self.model.device)
        x = torch.stack([self._x[i] for i in plan.pictures])
        latents = self.model.embed_latents(x, t, plan.position_ids)
        delimiters = self._delimiters.expand(len(rows), -1, -1)
        _, hidden = self.model.language_model(delimiters, latents, plan.rows, self.slab)
        v = self.model.velocity(hidden)
        place = {row: at for at, row in enumerate(rows)}
        result: dict[int, dict[BranchName, Tensor]] = {i: {} for i in wanted}
        for i, name in names:
            result[i][name] = v[place[self._row_of[i, name]], : self.pictures[i].tokens]
        return result

    def _padded_ids(self, picture: Picture) -> Tensor:
        ids = torch.zeros(self.padded, dtype=torch.int64)
        ids[: picture.tokens] = grid_position_ids(*picture.grid, self.model.config.max_latent_size)
        return ids

    def _plan(self, rows: tuple[int, ...]) -> _Plan:
        """The layout of a step over these rows; made once, as most steps run the same rows."""
        if rows not in self._plans:
            chosen = [self._rows[row] for row in rows]
            pictures = tuple(row.picture for row in chosen)
            layout = latent_rows(
                self.model.language_model,
                [row.start for row in chosen],
                [row.context.length for row in chosen],
                [row.context.rope for row in chosen],
                [self.pictures[i].tokens for i in pictures],
                self.padded,
            )
            self._plans[rows] = _Plan(layout, pictures, torch.stack([self._position_ids[i] for i in pictures]))
        return self._plans[rows]


class StepGate:
    """Lets the host run at most one step ahead of the device, so that progress is true and a cancel is quick.

    done: the size and the seconds of the latest step that is known to be done, once one is: on a GPU the one before
    that which was launched last, on a CPU that one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: tuple[int, Moment, Moment] | None = None
        self.done: tuple[int, float] | None = None

    @contextmanager
    def step(self, size: int) -> Iterator[None]:
        """Around the launch of a step of so many pictures; waits until the one before it is done."""
        begin = mark(self._device)
        yield
        now = (size, begin, mark(self._device))
        before, self._before = (self._before, now) if self._device.type == "cuda" else (now, None)
        self.done = None if before is None else (before[0], seconds_between(*before[1:]))


def preview_steps(steps: int, previews: int) -> tuple[int, ...]:
    """The Euler steps (from 1) in which so many previews are made: the first after a fifth of them, none in the last.

    Few steps give fewer previews.
    """
    spread = (-(-steps * (previews + 4 * i) // (5 * previews)) for i in range(previews))
    return tuple(sorted({step for step in spread if step < steps}))


def clean_estimate(x: Tensor, velocity: Tensor, time: float) -> Tensor:
    """What latents at `time` tend to: x0 = x_t - t v, as x_t = (1 - t) x0 + t noise and v = noise - x0."""
    return x - time * velocity


def decode_picture(model: Bagel, latents: Tensor, grid: tuple[int, int], *, quick: bool = False) -> Tensor:
    """Latent tokens [tokens, features] -> decoder output [3, H, W], not clamped.

    quick: in bfloat16 on a GPU, a fraction of the time; for previews.
    """
    latent = latent_unpatchify(latents, *grid, model.config.latent_patch_size)
    half = torch.autocast("cuda", torch.bfloat16, enabled=quick and latents.is_cuda)
    with torch.inference_mode(), half:
        return model.autoencoder().decode(latent[None])[0].float()
