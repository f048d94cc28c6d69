"""Text decoding as CUDA graphs: one launch computes one token of several texts, and one more samples them.

A graph is captured for a number of texts over one slab and replayed with other places, so that texts come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.engine.capture import GraphMaker
from bagel.engine.layout import text_rows_at
from bagel.engine.sampling import Choice, draw, numbers
from bagel.model.attention import KvSlab
from bagel.model.bagel import Bagel


@dataclass(frozen=True)
class Fed:
    """A text's next input: a token, its rotary position, its place in the slab, and where its K/V begin there."""

    token: int
    position: int
    slot: int
    start: int


class DecodeGraphs:
    """The captured forwards of one slab, by number of texts; each is made when it is first needed.

    Texts are padded to the next power of two with copies of `spare`, whose K/V are never read.
    """

    def __init__(self, model: Bagel, slab: KvSlab, spare: Fed) -> None:
        self.slab = slab
        self._model, self._spare, self._maker = model, spare, GraphMaker(model.device)
        self._graphs: dict[int, _DecodeGraph] = {}

    def forward(self, fed: Sequence[Fed]) -> tuple[Tensor, Tensor]:
        """As TextBatch's forward: logits [texts, vocab], and `best` of them. Both are overwritten by the next call."""
        count = _padded(len(fed))
        padded = [*fed, *[self._spare] * (count - len(fed))]
        if count not in self._graphs:
            self._graphs[count] = _DecodeGraph(self._model, self.slab, padded, self._maker)
        logits, found = self._graphs[count].replay(padded)
        return logits[: len(fed)], found[:, : len(fed)]

    def sample(self, choices: Sequence[Choice]) -> None:
        """Draw the tokens of the texts of the last `forward` into its `best`; no choice has a repetition penalty."""
        count = _padded(len(choices))
        self._graphs[count].sample([*choices, *[choices[0]] * (count - len(choices))])


class _DecodeGraph:
    """One captured forward of a number of texts."""

    def __init__(self, model: Bagel, slab: KvSlab, fed: Sequence[Fed], maker: GraphMaker) -> None:
        """fed: of a step that is to be taken. The forwards before the capture write the K/V that its replay writes."""
        self._model, self._slab = model, slab
        # Pinned, so that the copy to the device does not make the host wait.
        self._from_host = torch.zeros(4, len(fed), dtype=torch.int64).pin_memory()
        self._fed = torch.zeros(4, len(fed), dtype=torch.int64, device=model.device)
        self._feed(fed)
        self._maker = maker
        self._graph, (self._logits, self._best) = maker.capture(self._forward)
        # Captured when a text first samples: most never do.
        self._sampling: torch.cuda.CUDAGraph | None = None
        self._numbers = torch.zeros(0)

    def replay(self, fed: Sequence[Fed]) -> tuple[Tensor, Tensor]:
        """The forward of these texts."""
        self._feed(fed)
        self._graph.replay()
        return self._logits, self._best

    def sample(self, choices: Sequence[Choice]) -> None:
        """Draw the tokens of the texts of the last replay."""
        values = numbers(choices, self._logits.shape[-1])
        if self._sampling is None:
            self._numbers = values.to(self._model.device)
            self._sampling, _ = self._maker.capture(self._draw)
        # Pinned, so that the copy to the device does not make the host wait.
        self._numbers.copy_(values.pin_memory(), non_blocking=True)
        self._sampling.replay()

    def _draw(self) -> None:
        self._best[0].copy_(draw(self._logits, self._numbers))

    def _feed(self, fed: Sequence[Fed]) -> None:
        places = [(each.token, each.position, each.slot, each.start) for each in fed]
        self._from_host.copy_(torch.tensor(places).T)
        self._fed.copy_(self._from_host, non_blocking=True)

    def _forward(self) -> tuple[Tensor, Tensor]:
        tokens, positions, slots, starts = self._fed
        decoder = self._model.language_model
        places = torch.stack((starts, slots - starts, positions))
        # A graph is captured with one bound for all replays: no row is longer than the slab.
        rows = text_rows_at(decoder, places, 1, longest=self._slab.k.shape[1])
        hidden, _ = decoder(self._model.embed(tokens[:, None]), None, rows, self._slab)
        logits = decoder.logits(hidden[:, -1])
        return logits, best(logits)


def _padded(texts: int) -> int:
    """Texts that a graph computes for so many: a power of two, so that a few graphs serve any number."""
    return 1 << (texts - 1).bit_length()


def best(logits: Tensor) -> Tensor:
    """Of logits [texts, vocab] the likeliest ids, and whether all are finite: [2, texts] int64."""
    return torch.stack((logits.argmax(-1), logits.isfinite().all(-1).long()))
