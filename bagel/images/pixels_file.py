"""Pixels on their way from a worker to its pool: a file without a name, in memory where the system has such files.

A pipe takes 64 KiB or a mebibyte at a time, for each of which both ends wake up; the pixels of one image are six.
"""

from __future__ import annotations

import os
import tempfile

KEPT_BYTES = 16 << 20
"""That a file keeps for the next image: the largest that the public model reads, for both encoders, has six."""


def make() -> int:
    """A new file; its descriptor, for the caller to close."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("bagel-pixels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write(file: int, pixels: bytes, at: int) -> None:
    """Write pixels from that byte of the file on."""
    left = memoryview(pixels)
    while left:
        written = os.pwrite(file, left, at)
        at, left = at + written, left[written:]


def read(file: int, nbytes: int, at: int) -> bytes:
    """So many bytes from that one on; fewer if the file has fewer.

    By a call and not by mapping it: a worker that shortens the file must not be the end of this process.
    """
    return os.pread(file, nbytes, at)


def trim(file: int) -> None:
    """Let a file go back to nothing that has more than it may keep."""
    if os.fstat(file).st_size > KEPT_BYTES:
        os.ftruncate(file, 0)
