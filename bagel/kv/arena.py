"""Shared memory of a fixed budget.

The memory belongs to no path: it goes with the last process that maps it, killed or not.
"""

from __future__ import annotations

import mmap
import os
import tempfile

ALIGNMENT = 64
"""Bytes that each block of an arena begins at a multiple of: a cache line."""


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
