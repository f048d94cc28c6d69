"""Short texts of contexts as CUDA graphs: one launch computes the K/V of a text behind what its context has so far.

A prompt has some ten tokens, for which the device needs a fraction of the time in which the host launches their forward
kernel by kernel. A graph is captured for a number of tokens over the slab that texts are decoded in, where the context
is copied for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bagel.engine.capture import GraphMaker
from bagel.engine.layout import text_rows_at
from bagel.engine.slab import NoRoom, SharedSlab
from bagel.model.attention import KvSlab, upload
from bagel.model.bagel import Bagel

SIZES = (8, 16, 32, 64, 128)
"""Tokens that graphs are captured for. A text is padded to the next of them; a longer one is launched kernel by kernel,
which then hides behind what the device computes."""


class PrefillGraphs:
    """The captured forwards of texts; each is made when it is first needed."""

    def __init__(self, model: Bagel, space: SharedSlab) -> None:
        self._model, self._space, self._maker = model, space, GraphMaker(model.device)
        self._graphs: dict[int, _PrefillGraph] = {}

    @classmethod
    def over(cls, model: Bagel, space: SharedSlab) -> PrefillGraphs | None:
        """The graphs that use free room of a slab; None where forwards are not captured."""
        return cls(model, space) if model.language_model.backend.captures else None

    def compute(self, token_ids: Sequence[int], past: int, rope: int, slab: KvSlab) -> bool:
        """Write the K/V of a text, at positions from `rope` on, behind the `past` tokens that a slab has.

        False if the text is too long, or there is no room for its context at the moment: nothing is written then.
        """
        count = len(token_ids)
        size = next((size for size in SIZES if size >= count), 0)
        if not size:
            return False
        try:
            start = self._space.take(past + size)
        except NoRoom:
            return False
        try:
            # All on one stream, so whoever takes this room next writes to it after it was read here.
            shared, known = self._space.slab, slice(start, start + past)
            shared.k[:, known], shared.v[:, known] = slab.k[:, :past], slab.v[:, :past]
            self._replay([*token_ids, *[token_ids[-1]] * (size - count)], start, past, rope)
            made, place = slice(known.stop, known.stop + count), slice(past, past + count)
            slab.k[:, place], slab.v[:, place] = shared.k[:, made], shared.v[:, made]
        finally:
            self._space.give(start)
        return True

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture all of them."""
        model = self._model
        for size in SIZES:
            slab = KvSlab(model.kv_shape, size, dtype=model.dtype, device=model.device)
            self.compute([0] * size, 0, 0, slab)

    def _replay(self, token_ids: Sequence[int], start: int, past: int, rope: int) -> None:
        size, fed = len(token_ids), [start, past, rope, *token_ids]
        if size not in self._graphs:
            self._graphs[size] = _PrefillGraph(self._model, self._space.slab, fed, self._maker)
        self._graphs[size].replay(fed)


class _PrefillGraph:
    """One captured forward of a number of tokens. Those of padding come last, so no other sees them."""

    def __init__(self, model: Bagel, slab: KvSlab, fed: Sequence[int], maker: GraphMaker) -> None:
        """fed: start, past and rope of a text that is to be computed, and its ids: the forwards before the capture
        write the K/V that its replay writes."""
        self._model, self._slab = model, slab
        self._fed = torch.zeros(len(fed), dtype=torch.int64, device=model.device)
        self._feed(fed)
        self._graph, _ = maker.capture(self._forward)

    def replay(self, fed: Sequence[int]) -> None:
        """Compute this text."""
        self._feed(fed)
        self._graph.replay()

    def _feed(self, fed: Sequence[int]) -> None:
        self._fed.copy_(upload(list(fed), torch.int64, self._fed.device))

    def _forward(self) -> None:
        decoder, ids = self._model.language_model, self._fed[3:]
        # A graph is captured with one bound for all replays: no row is longer than the slab.
        rows = text_rows_at(decoder, self._fed[:3, None], len(ids), longest=self._slab.k.shape[1])
        decoder(self._model.embed(ids[None]), None, rows, self._slab)
