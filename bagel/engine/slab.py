"""A K/V slab whose intervals come and go, as texts and pictures join and leave a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bagel.model.attention import KvSlab
from bagel.model.config import LlmConfig


class SharedSlab:
    """Intervals of tokens in one slab, taken first-fit; it grows when none is free.

    Growing copies the slab to a larger one: places stay what they are, tensors taken from `slab` before do not.
    read_ahead: LayerBackend.read_ahead. Each interval is that much longer and begins as zeros, so that what attention
    reads too much is finite, whatever was there before and whatever the next interval holds.
    """

    def __init__(
        self,
        config: LlmConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        read_ahead: int = 0,
        lengths: Sequence[int] = (),
    ) -> None:
        """lengths: intervals that there is room for to begin with."""
        self._config, self._dtype, self._device, self._read_ahead = config, dtype, device, read_ahead
        self._taken: dict[int, int] = {}
        self._size = sum(tokens + read_ahead for tokens in lengths)
        self.slab = KvSlab(config, self._size, dtype=dtype, device=device)

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
        tokens += self._read_ahead
        start = 0
        for begin in sorted(self._taken):
            if begin - start >= tokens:
                break
            start = begin + self._taken[begin]
        if start + tokens > self._size:
            self._grow(start + tokens)
        if self._read_ahead:
            self.slab.clear(start, tokens)
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
