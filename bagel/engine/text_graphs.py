"""Text decoding as CUDA graphs: one launch computes one token of several texts.

Launched kernel by kernel, such a step waits for the host more than it computes. A graph is captured for a number of
texts over one slab and replayed with other places, so that texts come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.engine.layout import text_rows_at
from bagel.model.attention import KvSlab
from bagel.model.bagel import Bagel

WARM_UPS = 2
"""Forwards before a capture: they compile kernels and let libraries allocate, which a capture may not."""


@dataclass(frozen=True)
class Fed:
    """A text's next input: a token, its rotary position, its place in the slab, and where its K/V begin there."""

    token: int
    position: int
    slot: int
    start: int


class DecodeGraphs:
    """The captured forwards of one slab, by number of texts; each is made when it is first needed.

    Texts are padded to the next power of two with copies of `spare`, whose K/V nobody reads.
    """

    def __init__(self, model: Bagel, slab: KvSlab, spare: Fed) -> None:
        self.slab = slab
        self._model, self._spare = model, spare
        self._graphs: dict[int, _DecodeGraph] = {}

    def forward(self, fed: Sequence[Fed]) -> tuple[Tensor, Tensor]:
        """As TextBatch's forward: logits [texts, vocab], and `best` of them. Both are overwritten by the next call."""
        count = 1 << (len(fed) - 1).bit_length()
        if count not in self._graphs:
            self._graphs[count] = _DecodeGraph(self._model, self.slab, count)
        logits, found = self._graphs[count].replay([*fed, *[self._spare] * (count - len(fed))])
        return logits[: len(fed)], found[:, : len(fed)]


class _DecodeGraph:
    """One captured forward of `count` texts."""

    def __init__(self, model: Bagel, slab: KvSlab, count: int) -> None:
        device = model.device
        self._model, self._slab = model, slab
        self._from_host = torch.zeros(4, count, dtype=torch.int64).pin_memory()
        self._fed = torch.zeros(4, count, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward()
        torch.cuda.current_stream(device).wait_stream(side)
        # The autoencoder's thread may allocate meanwhile, which must not end the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits, self._best = self._forward()

    def replay(self, fed: Sequence[Fed]) -> tuple[Tensor, Tensor]:
        """The forward of these texts."""
        places = [(each.token, each.position, each.slot, each.start) for each in fed]
        self._from_host.copy_(torch.tensor(places).T)
        self._fed.copy_(self._from_host, non_blocking=True)
        self._graph.replay()
        return self._logits, self._best

    def _forward(self) -> tuple[Tensor, Tensor]:
        tokens, positions, slots, starts = self._fed
        decoder = self._model.language_model
        places = torch.stack((starts, slots - starts, positions))
        rows = text_rows_at(decoder, places, 1, longest=self._slab.k.shape[1])
        hidden, _ = decoder(self._model.embed(tokens[:, None]), None, rows, self._slab)
        logits = decoder.logits(hidden[:, -1])
        return logits, best(logits)


def best(logits: Tensor) -> Tensor:
    """Of logits [texts, vocab] the likeliest ids, and whether all are finite: [2, texts] int64."""
    return torch.stack((logits.argmax(-1), logits.isfinite().all(-1).long()))
