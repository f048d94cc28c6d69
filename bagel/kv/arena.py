"""Shared memory of a fixed budget, and who has which part of it.

The memory belongs to no path: it goes with the last process that maps it, killed or not.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import bisect_left

ALIGNMENT = 64


class Arena:
    """`nbytes` of shared memory, which the kernel commits as it is written.

    fd is its file; another process maps it with `Arena.attach(fd, nbytes)`, a spawned child after
    `multiprocessing.reduction.DupFd(arena.fd).detach()`.
    """

    def __init__(self, nbytes: int) -> None:
        self._open(_anonymous_file(nbytes), nbytes)

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Arena:
        """The same memory in another process. Takes fd over: `close` closes it."""
        arena = cls.__new__(cls)
        arena._open(fd, nbytes)
        return arena

    def _open(self, fd: int, nbytes: int) -> None:
        self.fd, self.nbytes = fd, nbytes
        self.buffer = memoryview(mmap.mmap(fd, nbytes))

    def slice(self, begin: int, nbytes: int) -> memoryview:
        """A writable view of `nbytes` from `begin`, without a copy."""
        return self.buffer[begin : begin + nbytes]

    def close(self) -> None:
        """Close the file; the memory stays mapped as long as views of it are alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


def _anonymous_file(nbytes: int) -> int:
    """A file of `nbytes` without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("bagel-kv", os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp(prefix="bagel-kv-")
        os.unlink(path)
    os.ftruncate(fd, nbytes)
    return fd


class Allocator:
    """First-fit allocation of a range of `nbytes`; freed neighbours become one again."""

    def __init__(self, nbytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, nbytes)] if nbytes else []  # (begin, size), by begin

    def allocate(self, nbytes: int) -> int | None:
        """Begin of a block of at least `nbytes`; None if no hole is large enough."""
        size = aligned(nbytes)
        for i, (begin, room) in enumerate(self._free):
            if room >= size:
                self._free[i : i + 1] = [(begin + size, room - size)] if room > size else []
                return begin
        return None

    def free(self, begin: int, nbytes: int) -> None:
        """Give a block back, by the begin and size that it was allocated with."""
        size = aligned(nbytes)
        i = bisect_left(self._free, (begin, 0))
        if i < len(self._free) and self._free[i][0] == begin + size:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == begin:
            begin, before = self._free.pop(i - 1)
            size, i = size + before, i - 1
        self._free.insert(i, (begin, size))

    @property
    def free_bytes(self) -> int:
        return sum(size for _, size in self._free)


def aligned(nbytes: int) -> int:
    """What a block of `nbytes` takes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
