"""The device's memory: whether an error says that it ran out."""

from __future__ import annotations

import torch

_TOLD = ("out of memory", "not enough memory", "allocate memory", "_ALLOC_FAILED")
"""Of CUDA outside of PyTorch's allocator, of a CPU's allocator, of cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of PyTorch's ways to say that a device has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOLD)
