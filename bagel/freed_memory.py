"""The C allocator: memory of a page or an image that was freed is used for the next one. No torch here."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
SETTINGS = {M_MMAP_THRESHOLD: 16 << 20, M_TRIM_THRESHOLD: 256 << 20, M_TOP_PAD: 16 << 20}
"""Bytes; at most 256 MiB that are freed stay with the process."""
OFF = "BAGEL_MALLOC"


def reuse_freed_memory() -> bool:
    """Let glibc keep freed memory; whether it does now. Off with BAGEL_MALLOC=0, and without glibc.

    As it is set by default, glibc gives the memory of each page of K/V, and of each image, back to the kernel, which
    then clears as many bytes anew as are moved (its share: `python -m bench pull` with and without).
    """
    if os.environ.get(OFF) == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) for option, value in SETTINGS.items())
