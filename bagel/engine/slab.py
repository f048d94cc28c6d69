"""A K/V slab whose intervals come and go, as texts and pictures join and leave a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bagel.model.attention import KvSlab
from bagel.model.config import LlmConfig


class SharedSlab:
    """Intervals of tokens in one slab, taken first-fit; it grows when none is free.

    Growing copies the slab to a larger one: places stay what they are, tensors taken from `slab` before do not.
    """

    def __init__(self, config: LlmConfig, *, dtype: torch.dtype, device: torch.device, tokens: int = 0) -> None:
        """tokens: room to begin with."""
        self._config, self._dtype, self._device = config, dtype, device
        self._taken: dict[int, int] = {}
        self._size = tokens
        self.slab = KvSlab(config, tokens, dtype=dtype, device=device)

    @property
    def taken(self) -> int:
        """Tokens of the intervals that are taken."""
        return sum(self._taken.values())

    def take_all(self, lengths: Sequence[int]) -> list[int]:
        """First tokens of free intervals of these lengths; none is taken if memory runs out for one of them."""
        starts: list[int] = []
        try:
            for tokens in lengths:
                starts.append(self.take(tokens))
        except BaseException:
            for start in starts:
                self.give(start)
            raise
        return starts

    def take(self, tokens: int) -> int:
        """First token of a free interval of that length."""
        start = 0
        for begin in sorted(self._taken):
            if begin - start >= tokens:
                break
            start = begin + self._taken[begin]
        if start + tokens > self._size:
            self._grow(start + tokens)
        self._taken[start] = tokens
        return start

    def give(self, start: int) -> None:
        """Give an interval back."""
        del self._taken[start]

    def _grow(self, needed: int) -> None:
        size = max(needed, self._size + self._size // 2)
        slab = KvSlab(self._config, size, dtype=self._dtype, device=self._device)
        for begin, tokens in self._taken.items():
            slab.k[:, begin : begin + tokens] = self.slab.k[:, begin : begin + tokens]
            slab.v[:, begin : begin + tokens] = self.slab.v[:, begin : begin + tokens]
        self.slab, self._size = slab, size
