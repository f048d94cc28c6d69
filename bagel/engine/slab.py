"""A K/V slab whose intervals come and go, as texts and pictures join and leave a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from bagel.kv.first_fit import FirstFit
from bagel.model.attention import KvShape, KvSlab


class NoRoom(Exception):
    """A slab of a fixed size has no free interval of the length that was asked for."""


class SharedSlab:
    """Intervals of tokens in one slab, taken first-fit.

    One that grows copies itself to a larger one where none is free: places stay what they are, tensors taken from
    `slab` before do not. One of a fixed `size` is allocated once; owners wait for room there in the order in which
    they first asked (`has_room`), so that a large one is not passed by small ones for ever.
    read_ahead: LayerBackend.read_ahead. Each interval is that much longer and begins as zeros, so that what attention
    reads too much is finite, whatever was there before and whatever the next interval holds.
    """

    def __init__(
        self,
        shape: KvShape,
        *,
        dtype: torch.dtype,
        device: torch.device,
        read_ahead: int = 0,
        lengths: Sequence[int] = (),
        size: int | None = None,
    ) -> None:
        """lengths: intervals that there is room for to begin with; size: tokens of one that does not grow."""
        self._shape, self._dtype, self._device, self._read_ahead = shape, dtype, device, read_ahead
        self._taken: dict[int, int] = {}
        self._waiting: dict[Hashable, None] = {}
        self._grows = size is None
        self.size = self.needed(lengths) if size is None else size
        self._allocator = FirstFit(self.size)
        # The spare token of one that does not grow lies behind its size, so that a full slab has it too.
        self._spare = size
        behind = 0 if size is None else 1 + read_ahead
        self.slab = KvSlab(shape, self.size + behind, dtype=dtype, device=device)

    @property
    def taken(self) -> int:
        """Tokens of the intervals that are taken, but for the spare one."""
        return sum(tokens for start, tokens in self._taken.items() if start != self._spare)

    def spare(self) -> int:
        """A token's place that may be written to and that nobody reads."""
        if self._spare is None:
            self._spare = self.take(1)
        return self._spare

    def needed(self, lengths: Sequence[int]) -> int:
        """Tokens that intervals of these lengths take."""
        return sum(tokens + self._read_ahead for tokens in lengths)

    def has_room(self, owner: Hashable, lengths: Sequence[int]) -> bool:
        """Whether it is an owner's turn and there are free intervals of these lengths; if not, it waits in line."""
        if self._grows:
            return True
        self._waiting.setdefault(owner)
        sizes = (tokens + self._read_ahead for tokens in lengths)
        if next(iter(self._waiting)) != owner or not self._allocator.fits(*sizes):
            return False
        del self._waiting[owner]
        return True

    def withdraw(self, owner: Hashable) -> None:
        """An owner waits no more; nothing if it did not."""
        self._waiting.pop(owner, None)

    def take_all(self, lengths: Sequence[int]) -> list[int]:
        """First tokens of free intervals of these lengths; none is taken if there is no room for one of them."""
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
        """First token of a free interval of that length. Raises NoRoom if there is none and the slab does not grow."""
        tokens += self._read_ahead
        if (start := self._allocator.allocate(tokens)) is None:
            if not self._grows:
                raise NoRoom
            start = self._grown(tokens)
        if self._read_ahead:
            self.slab.clear(start, tokens)
        self._taken[start] = tokens
        return start

    def give(self, start: int) -> None:
        """Give an interval back."""
        self._allocator.free(start, self._taken.pop(start))

    def _grown(self, tokens: int) -> int:
        """First token of an interval in a larger slab."""
        start = self._allocator.end
        size = max(start + tokens, self.size + self.size // 2)
        slab = KvSlab(self._shape, size, dtype=self._dtype, device=self._device)
        for begin, length in self._taken.items():
            slab.k[:, begin : begin + length] = self.slab.k[:, begin : begin + length]
            slab.v[:, begin : begin + length] = self.slab.v[:, begin : begin + length]
        self.slab, self.size = slab, size
        self._allocator.grow(size)
        allocated = self._allocator.allocate(tokens)
        assert allocated == start
        return start
