"""Drawing pictures: Euler steps over a batch of pictures, each with one to three branches of guidance.

Buffers are static. Each branch owns an interval of one K/V slab, [context | latents]: its context is written once,
a step writes only the rows of its latents. Equal branches of a picture share one row. Within a step the host
never waits for the device; it runs at most one step ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel.engine.clock import Piece, mark, seconds_between
from bagel.engine.early_step import EarlyStep, least_layers
from bagel.engine.layout import latent_rows
from bagel.engine.picture import ContextKv, Picture
from bagel.engine.slab import SharedSlab
from bagel.engine.step_graphs import MOST_LATENTS, StepGraphs, StepInputs, row_velocities
from bagel.model.attention import KvSlab, Rows, upload
from bagel.model.bagel import Bagel
from bagel.model.flow import guide, guiding_branches
from bagel.model.layers import grid_position_ids
from bagel.parallel.groups import ALONE, UNDIVIDED, Group, Groups
from bagel.parallel.rows import Division, parts_of
from bagel.prompts import BranchName

Velocities = Mapping[BranchName, Tensor]


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
        self._early: dict[Drawing, tuple[tuple[_Row, ...], EarlyStep]] = {}

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
        x[: picture.tokens] = upload(picture.noise, torch.float32, device)
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
        self._early.pop(drawing, None)
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
        velocity = self._computed_ahead(wanted)
        # In the canvas's order, not the caller's, so that the same set of rows finds its layout again.
        rows = [row for drawing in self.drawings for row in _rows_of(drawing, wanted) if row not in velocity]
        if rows:
            division = Division.of(_lengths(rows), self._groups.rows)
            computed = self._compute_together([rows[each] for each in division.mine])
            velocity |= zip(rows, division.exchange(computed), strict=True)
        return {
            drawing: {name: velocity[drawing.rows[name]][: drawing.picture.tokens] for name in sorted(names)}
            for drawing, names in wanted.items()
        }

    def takes_early_step(self, drawing: Drawing, layers: int) -> bool:
        """Whether `advance` may be called for a picture that has taken no step, with so many layers there.

        Not of ranks, which would have to agree how far, nor with weights that come layer by layer for every forward.
        Small steps are better taken with those of other pictures, or replayed.
        """
        of_model = self.model.language_model.layers
        if self._groups.world.size > 1 or of_model.stream is not None or layers < least_layers(len(of_model)):
            return False
        return len(_first_rows(drawing)) * self.padded > MOST_LATENTS

    @torch.inference_mode()
    def advance(self, drawing: Drawing, layers: int) -> None:
        """Compute the first so many layers of a picture's first step. Their K/V are in the slab, as `step` needs all.

        The step that follows goes on from there.
        """
        if drawing not in self._early:
            rows = _first_rows(drawing)
            inputs, layout = self._inputs(rows, ALONE)
            self._early[drawing] = rows, EarlyStep(self.model, self._delimiters, inputs, layout.rows, self.slab)
        _, early = self._early[drawing]
        early.advance(layers)

    def layers_ahead(self, drawing: Drawing) -> tuple[int, float | None]:
        """Layers of a picture's next step that are launched, and since when, by time.monotonic; from any thread."""
        begun = self._early.get(drawing)
        return (0, None) if begun is None else (begun[1].layers, begun[1].began_at)

    def pieces_ahead(self, drawing: Drawing) -> tuple[Piece, ...]:
        """When these layers were computed."""
        begun = self._early.get(drawing)
        return () if begun is None else tuple(begun[1].pieces)

    def _computed_ahead(self, wanted: Iterable[Drawing]) -> dict[_Row, Tensor]:
        """The velocities of rows whose forward was begun by `advance`, [padded, features] each; ends these."""
        velocity: dict[_Row, Tensor] = {}
        for drawing in wanted:
            if (begun := self._early.pop(drawing, None)) is not None:
                rows, early = begun
                velocity |= zip(rows, early.velocities(), strict=True)
        return velocity

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
        inputs, layout = self._inputs(rows, context)
        if self._graphs is not None and self._graphs.take(len(rows), self.padded, context):
            return self._graphs.velocities(inputs, context)
        return row_velocities(self.model, self._delimiters, inputs, layout.rows, self.slab)

    def _inputs(self, rows: tuple[_Row, ...], context: Group) -> tuple[StepInputs, _Layout]:
        """What the forward of some rows gets at their pictures' present steps."""
        layout = self._layout(rows, context)
        t = upload([drawing.time for drawing in layout.drawings], torch.float32, self.model.device)
        x = torch.stack([drawing.x for drawing in layout.drawings])
        return StepInputs(x, t, layout.position_ids, layout.places), layout

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


def _rows_of(drawing: Drawing, wanted: Mapping[Drawing, frozenset[BranchName]]) -> tuple[_Row, ...]:
    """The rows of a picture's branches that are wanted, each once, as equal branches share one."""
    names = wanted.get(drawing, frozenset())
    return tuple(dict.fromkeys(row for name, row in drawing.rows.items() if name in names))


def _first_rows(drawing: Drawing) -> tuple[_Row, ...]:
    """The rows of a picture's next step."""
    return _rows_of(drawing, {drawing: drawing.branches()})


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
        self._before: tuple[int, list[Piece]] | None = None
        self.done: tuple[int, float] | None = None

    @contextmanager
    def step(self, size: int, ahead: Iterable[Piece] = ()) -> Iterator[None]:
        """Around the launch of a step of so many pictures; waits until the one before it is done.

        ahead: pieces of it that were computed before, which its seconds include.
        """
        begin = mark(self._device)
        yield
        now = size, [*ahead, (begin, mark(self._device))]
        # A CPU's step is done once its launch returns.
        before, self._before = (self._before, now) if self._device.type == "cuda" else (now, None)
        self.done = None if before is None else (before[0], sum(seconds_between(*piece) for piece in before[1]))


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
