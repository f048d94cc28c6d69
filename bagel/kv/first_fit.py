"""First-fit allocation of a range: bytes of an arena, tokens of a slab. No torch here."""

from __future__ import annotations

from bisect import bisect_left


class FirstFit:
    """Blocks of a range of `size` units, each in the first hole that is large enough; neighbouring holes become one."""

    def __init__(self, size: int, alignment: int = 1) -> None:
        """alignment: blocks begin at multiples of it, and take so many units."""
        self.size, self._alignment = size, alignment
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (begin, size), by begin

    def aligned(self, size: int) -> int:
        """What a block of `size` takes."""
        return -(-size // self._alignment) * self._alignment

    def allocate(self, size: int) -> int | None:
        """Begin of a block of at least `size`; None if no hole is large enough."""
        size = self.aligned(size)
        for i, (begin, room) in enumerate(self._free):
            if room >= size:
                self._free[i : i + 1] = [(begin + size, room - size)] if room > size else []
                return begin
        return None

    def free(self, begin: int, size: int) -> None:
        """Give a block back, by the begin and size that it was allocated with."""
        size = self.aligned(size)
        i = bisect_left(self._free, (begin, 0))
        if i < len(self._free) and self._free[i][0] == begin + size:
            size += self._free.pop(i)[1]
        # A hole's begin plus its size is its end: the hole before touches this block.
        if i and sum(self._free[i - 1]) == begin:
            begin, before = self._free.pop(i - 1)
            size, i = size + before, i - 1
        self._free.insert(i, (begin, size))

    def fits(self, *sizes: int) -> bool:
        """Whether blocks of all these sizes could be allocated, in this order."""
        trial = self.copy()  # several sizes may need the same hole
        return all(trial.allocate(size) is not None for size in sizes)

    def copy(self) -> FirstFit:
        """The same holes, to try things on."""
        copy = FirstFit(0, self._alignment)
        copy.size, copy._free = self.size, list(self._free)
        return copy

    @property
    def unused(self) -> int:
        """Units in all holes together."""
        return sum(size for _, size in self._free)
