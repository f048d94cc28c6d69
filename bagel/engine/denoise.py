"""Drawing pictures: Euler steps over a batch of pictures, each with one to three branches of guidance.

Buffers are static. Each branch owns an interval of one K/V slab, [context | latents]: its context is written once,
a step writes only the rows of its latents. Equal branches of a picture share one row. Within a step the host
never waits for the device; it runs at most one step ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel.engine.context import Context
from bagel.engine.layout import latent_rows
from bagel.model.attention import KvSlab, Rows, upload
from bagel.model.bagel import Bagel
from bagel.model.flow import guide, guided_steps, guiding_branches, latent_unpatchify, timesteps
from bagel.model.layers import grid_position_ids
from bagel.prompts import BranchName
from bagel.request import ImageSettings

Velocities = Mapping[BranchName, Tensor]
OnVelocity = Callable[[int, int, Velocities, Tensor], None]
"""Called with (picture, step, velocities by branch, guided velocity), each velocity [tokens, features] float32."""

SMALLEST_BUCKET = 16


def latent_bucket(tokens: int) -> int:
    """Latents that a row is padded to, so that few shapes exist to compile or capture: eight to an octave."""
    granularity = max(SMALLEST_BUCKET, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // granularity) * granularity


def needed_branches(settings: ImageSettings) -> frozenset[BranchName]:
    """Branches whose K/V a picture needs: gen, and those that guide it in at least one step."""
    times = timesteps(settings.steps, settings.timestep_shift)
    guided = any(guided_steps(times[:-1], settings.cfg_interval))
    return frozenset({BranchName.GEN}) | (guiding_branches(settings) if guided else frozenset())


@dataclass
class Picture:
    """One picture to draw.

    grid: (rows, columns) of latent tokens; noise: [rows * columns, features] float32, what it starts from;
    contexts: by branch; every branch that `needed_branches` names must be there.
    """

    settings: ImageSettings
    grid: tuple[int, int]
    noise: Tensor
    contexts: Mapping[BranchName, Context]
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

    def branches(self) -> frozenset[BranchName]:
        """Branches that the next step runs."""
        guiding = guiding_branches(self.settings) if self.guided[self.step] else frozenset()
        return frozenset({BranchName.GEN}) | guiding


@dataclass(frozen=True)
class _Row:
    """One distinct context of one picture and where its K/V lie."""

    picture: int
    context: Context
    start: int


@dataclass(frozen=True)
class _Plan:
    """The rows of one step. picture_index and position_ids are on the device."""

    rows: Rows
    picture_index: Tensor
    position_ids: Tensor


class Canvas:
    """Pictures being drawn together: their latents, their K/V slab, and the steps.

    pictures must fit one bucket: `padded` latents at least as many as each has.
    """

    def __init__(self, model: Bagel, pictures: Sequence[Picture], padded: int) -> None:
        self.model, self.pictures, self.padded = model, pictures, padded
        device, features = model.device, model.config.latent_features
        self._rows: list[_Row] = []
        self._row_of: dict[tuple[int, BranchName], int] = {}
        size = sum(self._place(i, picture) for i, picture in enumerate(pictures))
        self._slab = KvSlab(model.config.llm, size, dtype=model.dtype, device=device)
        for row in self._rows:
            row.context.copy_to(self._slab, row.start)
        self.x = torch.zeros(len(pictures), padded, features, device=device)
        for i, picture in enumerate(pictures):
            self.x[i, : picture.tokens] = picture.noise.to(device)
        self._position_ids = torch.stack([self._padded_ids(picture) for picture in pictures]).to(device)
        self._delimiters: Tensor = model.delimiter_embeddings()
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def latents(self, i: int) -> Tensor:
        """Latent tokens of picture i now, [tokens, features] float32."""
        return self.x[i, : self.pictures[i].tokens]

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
        times = [self.pictures[self._rows[row].picture].times for row in rows]
        steps = [self.pictures[self._rows[row].picture].step for row in rows]
        t = upload([series[step] for series, step in zip(times, steps, strict=True)], torch.float32, self.model.device)
        latents = self.model.embed_latents(self.x[plan.picture_index], t, plan.position_ids)
        delimiters = self._delimiters.expand(len(rows), -1, -1)
        _, hidden = self.model.language_model(delimiters, latents, plan.rows, self._slab)
        v = self.model.velocity(hidden)
        place = {row: at for at, row in enumerate(rows)}
        result: dict[int, dict[BranchName, Tensor]] = {i: {} for i in wanted}
        for i, name in names:
            result[i][name] = v[place[self._row_of[i, name]], : self.pictures[i].tokens]
        return result

    def _place(self, i: int, picture: Picture) -> int:
        """Give each distinct context of a picture an interval of the slab; the tokens they take."""
        start = sum(row.context.length + self.padded + 2 for row in self._rows)
        begin, known = start, {}
        for name, context in picture.contexts.items():
            if context.chain.digest not in known:
                known[context.chain.digest] = len(self._rows)
                self._rows.append(_Row(i, context, start))
                start += context.length + self.padded + 2
            self._row_of[i, name] = known[context.chain.digest]
        return start - begin

    def _padded_ids(self, picture: Picture) -> Tensor:
        ids = torch.zeros(self.padded, dtype=torch.int64)
        ids[: picture.tokens] = grid_position_ids(*picture.grid, self.model.config.max_latent_size)
        return ids

    def _plan(self, rows: tuple[int, ...]) -> _Plan:
        """The layout of a step over these rows; made once, as most steps run the same rows."""
        if rows not in self._plans:
            chosen = [self._rows[row] for row in rows]
            index = upload([row.picture for row in chosen], torch.int64, self.model.device)
            layout = latent_rows(
                self.model.language_model,
                [row.start for row in chosen],
                [row.context.length for row in chosen],
                [row.context.rope for row in chosen],
                [self.pictures[row.picture].tokens for row in chosen],
                self.padded,
            )
            self._plans[rows] = _Plan(layout, index, self._position_ids[index])
        return self._plans[rows]


class StepGate:
    """Lets the host run at most one step ahead of the device, so that progress is true and a cancel is quick."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: torch.cuda.Event | None = None

    def passed(self) -> None:
        """Called after a step was launched: waits until the one before it is done."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.current_stream(self._device).record_event()
        if self._before is not None:
            self._before.synchronize()
        self._before = event


def decode_picture(model: Bagel, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latent tokens [tokens, features] -> decoder output [3, H, W], not clamped."""
    latent = latent_unpatchify(latents, *grid, model.config.latent_patch_size)
    with torch.inference_mode():
        return model.autoencoder().decode(latent[None])[0]
