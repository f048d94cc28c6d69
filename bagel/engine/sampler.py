"""Drawing pictures: Euler steps over a batch of pictures, each with one to three branches of guidance.

Buffers are static. Each branch owns an interval of one K/V slab, [context | latents]: its context is written once,
a step writes only the rows of its latents. Equal branches of a picture share one row. Within a step the host
never waits for the device; it runs at most one step ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bagel.checkpoint.limits import row_kv_tokens
from bagel.engine.clock import Moment, mark, seconds_between
from bagel.engine.commands import PlacedContext
from bagel.engine.layout import latent_rows
from bagel.engine.slab import SharedSlab
from bagel.engine.step_graphs import StepGraphs, StepInputs, row_velocities
from bagel.model.attention import KvSlab, Rows, upload
from bagel.model.bagel import Bagel
from bagel.model.flow import guide, guided_steps, guiding_branches, latent_unpatchify, timesteps
from bagel.model.layers import grid_position_ids
from bagel.parallel.groups import UNDIVIDED, Group, Groups
from bagel.parallel.rows import Division, parts_of
from bagel.prompts import BranchName
from bagel.request import ImageSettings

Velocities = Mapping[BranchName, Tensor]


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


# Compared by identity, as keys of layouts: contexts hold tensors.
@dataclass(frozen=True, eq=False)
class _Row:
    """One distinct context of a picture, and where its K/V begin in the slab."""

    drawing: Drawing
    context: ContextKv
    start: int


@dataclass(eq=False)
class Drawing:
    """A picture on a canvas.

    x: its latents now, [padded, features] float32; position_ids: theirs, [padded] int64; both on the device.
    step: Euler steps that are launched.
    """

    picture: Picture
    x: Tensor
    position_ids: Tensor
    rows: dict[BranchName, _Row] = field(default_factory=dict)
    step: int = 0

    @property
    def finished(self) -> bool:
        return self.step == self.picture.steps

    @property
    def latents(self) -> Tensor:
        """Its latent tokens now, [tokens, features] float32."""
        return self.x[: self.picture.tokens]

    @property
    def time(self) -> float:
        """The time where its next step begins."""
        return self.picture.times[self.step]

    def branches(self) -> frozenset[BranchName]:
        """Branches that the next step runs."""
        guiding = guiding_branches(self.picture.settings) if self.picture.guided[self.step] else frozenset()
        return frozenset({BranchName.GEN}) | guiding

    def place(self, branch: BranchName) -> int:
        """The token of the slab where a branch's context begins."""
        return self.rows[branch].start


OnVelocity = Callable[[Drawing, Velocities, Tensor], None]
"""Called before a step is taken with (drawing, velocities by branch, guided velocity), each [tokens, features]."""


@dataclass(frozen=True)
class _Layout:
    """The rows of a step. position_ids and places (StepInputs) are on the device."""

    rows: Rows
    places: Tensor
    drawings: tuple[Drawing, ...]
    position_ids: Tensor


class Canvas:
    """Pictures that are drawn together. They join and leave between steps.

    All fit one bucket: `padded` latents, at least as many as each has.
    """

    def __init__(
        self,
        model: Bagel,
        padded: int,
        space: SharedSlab,
        graphs: StepGraphs | None = None,
        groups: Groups = UNDIVIDED,
    ) -> None:
        """space: holds the pictures' K/V; graphs: of its slab; without them every step is launched kernel by kernel.

        groups: the ranks that compute steps together. All have canvases of the same pictures, and take the same steps.
        """
        self.model, self.padded, self._space, self._graphs, self._groups = model, padded, space, graphs, groups
        self.drawings: list[Drawing] = []
        self._delimiters: Tensor = model.delimiter_embeddings()
        self._layouts: dict[tuple[tuple[_Row, ...], int], _Layout] = {}

    @property
    def slab(self) -> KvSlab:
        """K/V of all pictures."""
        return self._space.slab

    @torch.inference_mode()
    def add(self, picture: Picture) -> Drawing:
        """Let a picture take part. Its contexts are written to the slab.

        All or nothing: a picture for which memory runs out leaves no trace.
        """
        if picture.tokens > self.padded:
            raise ValueError(f"a picture of {picture.tokens} latents does not fit a bucket of {self.padded}")
        device = self.model.device
        # Zeros, as K/V of the padding lie where attention may read ahead and must be finite.
        x = torch.zeros(self.padded, self.model.config.latent_features, device=device)
        x[: picture.tokens] = picture.noise.to(device)
        drawing = Drawing(picture, x, self._padded_ids(picture))
        distinct = picture.distinct()
        starts = self._place_contexts(list(distinct.values()), picture.kv_tokens(self.padded))
        # From here on nothing is allocated on the device, so nothing fails half-way.
        rows = {
            digest: _Row(drawing, context, start)
            for (digest, context), start in zip(distinct.items(), starts, strict=True)
        }
        drawing.rows |= {name: rows[context.digest] for name, context in picture.contexts.items()}
        self.drawings.append(drawing)
        return drawing

    def _place_contexts(self, contexts: Sequence[ContextKv], rooms: Sequence[int]) -> list[int]:
        """Write contexts to the slab, each with room for its latents; where each begins."""
        starts = self._space.take_all(rooms)
        try:
            for context, start in zip(contexts, starts, strict=True):
                context.copy_to(self.slab, start)
        except BaseException:
            for start in starts:
                self._space.give(start)
            raise
        return starts

    def remove(self, drawing: Drawing) -> None:
        """Let a picture leave."""
        self.drawings.remove(drawing)
        # A set, as equal branches share a row, which is given back once.
        for start in {row.start for row in drawing.rows.values()}:
            self._space.give(start)
        # Layouts that include it name places that others may get now.
        self._layouts = {key: each for key, each in self._layouts.items() if drawing not in each.drawings}

    @torch.inference_mode()
    def step(self, active: Sequence[Drawing], on_velocity: OnVelocity | None = None) -> None:
        """One Euler step of each of these pictures, in one forward."""
        velocities = self.velocities({drawing: drawing.branches() for drawing in active})
        for drawing in active:
            picture = drawing.picture
            guided = guide(velocities[drawing], picture.settings)
            if on_velocity is not None:
                on_velocity(drawing, velocities[drawing], guided)
            # In place, as x is the drawing's one buffer; its padding stays zero.
            drawing.latents.sub_(guided * picture.deltas[drawing.step])
            drawing.step += 1

    @torch.inference_mode()
    def velocities(self, wanted: Mapping[Drawing, frozenset[BranchName]]) -> dict[Drawing, dict[BranchName, Tensor]]:
        """Velocities of the given branches of the given pictures at their present step."""
        # In the canvas's order, not the caller's, so that the same set of rows finds its layout again.
        rows = list(
            dict.fromkeys(
                row
                for drawing in self.drawings
                for name, row in drawing.rows.items()
                if name in wanted.get(drawing, frozenset())
            )
        )
        division = Division.of(_lengths(rows), self._groups.rows)
        computed = self._compute_together([rows[each] for each in division.mine])
        velocity = dict(zip(rows, division.exchange(computed), strict=True))
        return {
            drawing: {name: velocity[drawing.rows[name]][: drawing.picture.tokens] for name in sorted(names)}
            for drawing, names in wanted.items()
        }

    def _compute_together(self, rows: Sequence[_Row]) -> Tensor:
        """As `_compute`, by the ranks of context parallel: they divide the rows, and within a part the latents."""
        context, lengths = self._groups.context, _lengths(rows)
        if (parts := parts_of(lengths, context.size)) == 1:
            return self._compute(tuple(rows), context)
        division = Division.of(lengths, context, parts)
        mine = tuple(rows[each] for each in division.mine)
        return torch.stack(division.exchange(self._compute(mine, self._groups.context_parts[parts])))

    def _compute(self, rows: tuple[_Row, ...], context: Group) -> Tensor:
        """The velocities of some rows at their pictures' present steps, [rows, padded, features] float32.

        context: the ranks that divide their latents.
        """
        layout = self._layout(rows, context)
        t = upload([drawing.time for drawing in layout.drawings], torch.float32, self.model.device)
        x = torch.stack([drawing.x for drawing in layout.drawings])
        inputs = StepInputs(x, t, layout.position_ids, layout.places)
        if self._graphs is not None and self._graphs.take(len(rows), self.padded, context):
            return self._graphs.velocities(inputs, context)
        return row_velocities(self.model, self._delimiters, inputs, layout.rows, self.slab)

    def _padded_ids(self, picture: Picture) -> Tensor:
        device = self.model.device
        ids = torch.zeros(self.padded, dtype=torch.int64, device=device)
        ids[: picture.tokens] = grid_position_ids(*picture.grid, self.model.config.max_latent_size, device)
        return ids

    def _layout(self, rows: tuple[_Row, ...], context: Group) -> _Layout:
        """The layout of a step over these rows; made once, as most steps run the same rows."""
        key = rows, context.size
        if key not in self._layouts:
            drawings = tuple(row.drawing for row in rows)
            places = (
                [row.start for row in rows],
                [row.context.length for row in rows],
                [row.context.rope for row in rows],
                [drawing.picture.tokens for drawing in drawings],
            )
            self._layouts[key] = _Layout(
                latent_rows(self.model.language_model, *places, self.padded, context),
                upload(places, torch.int64, self.model.device),
                drawings,
                torch.stack([each.position_ids for each in drawings]),
            )
        return self._layouts[key]


def _lengths(rows: Sequence[_Row]) -> list[int]:
    """The tokens of their contexts."""
    return [row.context.length for row in rows]


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
        # A CPU's step is done once its launch returns.
        before, self._before = (self._before, now) if self._device.type == "cuda" else (now, None)
        self.done = None if before is None else (before[0], seconds_between(*before[1:]))


def preview_steps(steps: int, previews: int) -> tuple[int, ...]:
    """The Euler steps (from 1) in which so many previews are made: the first after a fifth of them, none in the last.

    Few steps give fewer previews.
    """
    # steps * (1/5 + 4/5 * i / previews), rounded up.
    spread = (-(-steps * (previews + 4 * i) // (5 * previews)) for i in range(previews))
    return tuple(sorted({step for step in spread if step < steps}))


def clean_estimate(x: Tensor, velocity: Tensor, time: float) -> Tensor:
    """What latents at `time` tend to: x0 = x_t - t v, as x_t = (1 - t) x0 + t noise and v = noise - x0."""
    return x - time * velocity


def decode_picture(model: Bagel, latents: Tensor, grid: tuple[int, int], *, quick: bool = False) -> Tensor:
    """Latent tokens [tokens, features] -> decoder output [3, H, W], not clamped.

    quick: in bfloat16 on a GPU, a fraction of the time; for previews.
    """
    with _decoding(quick=quick and latents.is_cuda):
        return model.autoencoder().decode(_latent(model, latents, grid))[0].float()


def help_decode_picture(model: Bagel, latents: Tensor, grid: tuple[int, int], *, quick: bool = False) -> None:
    """The part of a rank that divides the tiles of a picture with the one that decodes it."""
    with _decoding(quick=quick and latents.is_cuda):
        model.autoencoder().help_decode(_latent(model, latents, grid))


def _latent(model: Bagel, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latent tokens as the autoencoder takes them, [1, z, h, w]."""
    return latent_unpatchify(latents, *grid, model.config.latent_patch_size)[None]


@contextmanager
def _decoding(*, quick: bool) -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=quick):
        yield
