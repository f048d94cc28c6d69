"""Shared memory of a fixed budget.

On Linux it belongs to no folder: it goes with the last process that maps it, killed or not.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import tempfile
from contextlib import suppress

from bagel.errors import ConfigError
from bagel.telemetry.logs import Log

ALIGNMENT = 64
"""Bytes that each block of an arena begins at a multiple of: a cache line."""
MADV_POPULATE_WRITE = 23
"""Of madvise(2), which Python's mmap does not name."""

log = Log("bagel.kv")


class Arena:
    """`nbytes` of shared memory, which the kernel commits as it is written.

    name: by which another process of this user on this host maps it, with `Arena.attach(name, nbytes)`.
    """

    def __init__(self, nbytes: int) -> None:
        """Raises ConfigError if the machine does not give so much."""
        try:
            fd, self.name = _shared_file(nbytes)
            self._open(fd, nbytes)
        except OSError as error:
            raise ConfigError(
                f"{nbytes} bytes of shared memory cannot be had: {error.strerror}; start the service with fewer bytes "
                "for K/V, or let it have more"
            ) from None

    @classmethod
    def attach(cls, name: str, nbytes: int) -> Arena:
        """The same memory in another process."""
        arena = cls.__new__(cls)
        arena.name = name
        arena._open(os.open(name, os.O_RDWR), nbytes)
        return arena

    def _open(self, fd: int, nbytes: int) -> None:
        self._fd, self.nbytes = fd, nbytes
        self.buffer = memoryview(mmap.mmap(fd, nbytes))

    def slice(self, begin: int, nbytes: int) -> memoryview:
        """A writable view of `nbytes` from `begin`, without a copy."""
        return self.buffer[begin : begin + nbytes]

    def map_now(self) -> bool:
        """Commit all of it and enter it into this process's page tables; whether the kernel could (Linux from 5.14).

        For memory that a device has pinned, which is committed already. A process that writes to such a page for the
        first time waits 2 µs for the kernel: with half a gigabyte of K/V, longer than their way over the network.
        Takes a second for some gigabytes; other threads run meanwhile.
        """
        first = ctypes.c_char.from_buffer(self.buffer)
        try:
            madvise = ctypes.CDLL(None).madvise
        except (AttributeError, OSError, TypeError):
            return False
        address, nbytes = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(self.nbytes)
        if madvise(address, nbytes, MADV_POPULATE_WRITE) == 0:
            return True
        log.warning(
            "the memory for K/V is mapped as it is used, which delays them",
            remedy="run on Linux 5.14 or newer, or let it have more memory",
        )
        return False

    def close(self) -> None:
        """Close the file; the memory stays mapped as long as views of it are alive."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # Opening may have failed before it was set.
        if hasattr(self, "_fd"):
            self.close()


def _shared_file(nbytes: int) -> tuple[int, str]:
    """A file of `nbytes`, in memory where the system can, and the path that other processes open it by.

    On Linux the path goes with this process. Elsewhere it is that of a temporary file, removed at exit.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("bagel-kv", os.MFD_CLOEXEC)
        # A memfd has no name in a folder; others open it through this process's descriptor.
        path = f"/proc/{os.getpid()}/fd/{fd}"
    else:
        fd, path = tempfile.mkstemp(prefix="bagel-kv-")
        # Not removed at once: other processes open it by its path.
        atexit.register(_remove, path)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd, path


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
