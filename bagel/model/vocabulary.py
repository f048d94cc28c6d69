"""The two tables of the vocabulary, embedding and LM head: each tensor-parallel rank keeps an equal range of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.model.linear import Linear, LinearFactory, Split
from bagel.parallel.mesh import Share


class VocabularyEmbedding(nn.Embedding):
    """Rows of tokens [..., hidden] by ids [...]; a rank looks up those that it has, and ranks add theirs up."""

    def __init__(self, linears: LinearFactory, tokens: int, hidden: int) -> None:
        self.share = linears.rank.equal(tokens)
        super().__init__(self.share.count, hidden, dtype=linears.dtype)
        self._group = linears.groups.tp

    def forward(self, ids: Tensor) -> Tensor:
        if self._group.size == 1:
            return super().forward(ids)
        mine = (ids >= self.share.start) & (ids < self.share.stop)
        rows = super().forward(torch.where(mine, ids - self.share.start, 0))
        # One rank has a token and the others bring zeros, so the sum is exact in any type.
        return self._group.add_up(rows * mine[..., None])


class LmHead(Linear):
    """Hidden states [..., hidden] -> logits of all tokens [..., tokens], gathered from the ranks."""

    def __init__(self, linears: LinearFactory, name: str, hidden: int, tokens: int) -> None:
        share, split = linears.rank.equal(tokens), Split.COLUMN if linears.rank.mesh.tp > 1 else Split.NONE
        # Never quantised: errors of the last layer cost most.
        super().__init__({name: share}, Share.all(hidden), split, bias=False, dtype=linears.dtype)
        self._group, self._most, self._tokens = linears.groups.tp, linears.rank.most(tokens), tokens

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if self._group.size == 1:
            return logits
        # The last rank may have fewer tokens, and ranks gather tensors of one shape.
        gathered = self._group.gather(F.pad(logits, (0, self._most - logits.shape[-1])))
        return gathered.movedim(0, -2).flatten(-2)[..., : self._tokens]
