"""Picture steps as CUDA graphs: one launch computes the velocities of a few small rows.

A graph is captured for a number of rows and a bucket, and replayed with other latents at other places.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bagel.engine.capture import GraphMaker
from bagel.engine.layout import latent_rows_at
from bagel.model.attention import KvSlab, Rows
from bagel.model.bagel import Bagel
from bagel.parallel.context import shard, whole
from bagel.parallel.groups import ALONE, Group

MOST_LATENTS = 2048
"""Latents of a step, all rows with their padding, for each rank that shares its work, up to which it is captured: of
more, the device takes longer than the host, and a graph gains nothing."""
MOST_GRAPHS = 32
"""Graphs that are kept; the least recently used goes first."""


class StepInputs(NamedTuple):
    """What a step's forward gets, a row each: latents x [rows, bucket, features] float32, their times t [rows] and
    position_ids [rows, bucket], and places [4, rows], as latent_rows_at takes them."""

    x: Tensor
    t: Tensor
    position_ids: Tensor
    places: Tensor


def row_velocities(model: Bagel, delimiters: Tensor, inputs: StepInputs, rows: Rows, slab: KvSlab) -> Tensor:
    """The velocities of all rows, [rows, bucket, features] float32. delimiters: their embeddings, [2, hidden].

    Ranks of context parallel compute a shard of the latents each, and gather the result.
    """
    assert rows.gen_kv is not None
    context = rows.gen_kv.group
    latents = model.embed_latents(shard(inputs.x, context), inputs.t, shard(inputs.position_ids, context))
    _, hidden = model.language_model(delimiters.expand(len(inputs.x), -1, -1), latents, rows, slab)
    return whole(model.velocity(hidden), context)


class StepGraphs:
    """The captured steps over one slab, by rows, bucket and ranks; each is made when it is first needed.

    context: ranks that divide the latents of a step's rows. Their exchanges of K/V are captured too, as all take the
    same steps.
    """

    def __init__(self, model: Bagel, slab: KvSlab) -> None:
        self.slab = slab
        self._model, self._delimiters, self._maker = model, model.delimiter_embeddings(), GraphMaker(model.device)
        self._graphs: dict[tuple[int, int, int], _StepGraph] = {}

    @classmethod
    def over(cls, model: Bagel, slab: KvSlab) -> StepGraphs | None:
        """The graphs of a slab; None where forwards are not captured."""
        if not model.language_model.backend.captures:
            return None
        return cls(model, slab)

    def take(self, rows: int, bucket: int, context: Group = ALONE) -> bool:
        """Whether a step of this shape is to be replayed."""
        ranks = context.size * self._model.groups.tp.size
        return self._model.language_model.backend.captures and rows * bucket <= MOST_LATENTS * ranks

    def velocities(self, inputs: StepInputs, context: Group = ALONE) -> Tensor:
        """As row_velocities."""
        rows, bucket = inputs.x.shape[:2]
        key = rows, bucket, context.size
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = _StepGraph(self._model, self._delimiters, self.slab, inputs, self._maker, context)
        self._graphs[key] = graph  # the last one is the latest
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph.replay(inputs)


class _StepGraph:
    """The captured forward of one shape."""

    def __init__(
        self,
        model: Bagel,
        delimiters: Tensor,
        slab: KvSlab,
        inputs: StepInputs,
        maker: GraphMaker,
        context: Group,
    ) -> None:
        # Of a step that is to be taken: the forwards before the capture write the K/V that its replay writes.
        mine = self._inputs = StepInputs(*(each.clone() for each in inputs))
        # A graph is captured with one bound for all replays: no row is longer than the slab.
        bucket, longest = inputs.x.shape[1], slab.k.shape[1]

        def forward() -> Tensor:
            rows = latent_rows_at(model.language_model, mine.places, bucket, longest, context=context)
            return row_velocities(model, delimiters, mine, rows, slab)

        self._graph, self._velocities = maker.capture(forward)

    def replay(self, inputs: StepInputs) -> Tensor:
        """The velocities of these rows, a tensor of its own."""
        for static, new in zip(self._inputs, inputs, strict=True):
            static.copy_(new)
        self._graph.replay()
        # A copy, as the next replay of any graph may overwrite the result.
        return self._velocities.clone()
