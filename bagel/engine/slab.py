"""A K/V slab whose intervals come and go, as texts and pictures join and leave a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from bagel.kv.first_fit import FirstFit
from bagel.model.attention import KvShape, KvSlab


class NoRoom(Exception):
    """A slab has no free interval of the length that was asked for."""


class SharedSlab:
    """Intervals of tokens in one slab of a fixed size, taken first-fit. Its tensors never move.

    Owners wait for room in the order in which they first asked (`has_room`), so that a large one is not passed by
    small ones for ever.
    """

    def __init__(
        self, shape: KvShape, *, dtype: torch.dtype, device: torch.device, size: int, read_ahead: int = 0
    ) -> None:
        """size: tokens; read_ahead: LayerBackend.read_ahead.

        Each interval is read_ahead longer and begins as zeros: what attention reads beyond it is finite then, whatever
        was there before and whatever the next interval holds.
        """
        self._read_ahead, self._allocator = read_ahead, FirstFit(size)
        self._taken: dict[int, int] = {}
        self._waiting: dict[Hashable, None] = {}
        # The spare token lies behind the others, so that a full slab has it too.
        self.slab = KvSlab(shape, size + 1 + read_ahead, dtype=dtype, device=device)

    @property
    def size(self) -> int:
        """Tokens that intervals can have together."""
        return self._allocator.size

    @property
    def taken(self) -> int:
        """Tokens of the intervals that are taken."""
        return sum(self._taken.values())

    @property
    def spare(self) -> int:
        """A token's place that may be written to and is never read."""
        return self.size

    def needed(self, lengths: Sequence[int]) -> int:
        """Tokens that intervals of these lengths take."""
        return sum(tokens + self._read_ahead for tokens in lengths)

    def has_room(self, owner: Hashable, lengths: Sequence[int]) -> bool:
        """Whether it is an owner's turn and there are free intervals of these lengths; if not, it waits in line."""
        self._waiting.setdefault(owner)
        fits = self._allocator.fits(*(tokens + self._read_ahead for tokens in lengths))
        # Pictures and texts wait in one line, of which only the first may take room.
        if next(iter(self._waiting)) != owner or not fits:
            return False
        del self._waiting[owner]
        return True

    def withdraw(self, owner: Hashable) -> None:
        """Take an owner out of the line, if it waits there."""
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
        """First token of a free interval of that length. Raises NoRoom if there is none."""
        tokens += self._read_ahead
        start = self._allocator.allocate(tokens)
        if start is None:
            raise NoRoom
        try:
            # Only attention that reads ahead needs zeros, which cost a write of the whole interval.
            if self._read_ahead:
                self.slab.clear(start, tokens)
        except BaseException:
            self._allocator.free(start, tokens)
            raise
        self._taken[start] = tokens
        return start

    def give(self, start: int) -> None:
        """Give an interval back."""
        self._allocator.free(start, self._taken.pop(start))
