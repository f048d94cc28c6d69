"""The device's memory: how much of it K/V get, and whether an error says that it ran out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from bagel.engine.slab import SharedSlab
from bagel.errors import ConfigError, OutOfMemory
from bagel.model.bagel import Bagel

DEFAULT_KV_TOKENS = 131_072
"""Tokens of K/V, contexts and latents, of pictures and texts at once: 7 GiB of the 7B in bfloat16."""

WORKING_BYTES = 9 * 2**29
"""4.5 GiB: what a GPU is left for computing, where that leaves K/V a quarter of what is free. The largest intermediate
results of the 7B at 1024 x 1024, and contexts that are kept for other requests."""

_WORDS = ("out of memory", "not enough memory", "allocate memory", "_ALLOC_FAILED")
"""Of CUDA outside of PyTorch's allocator, of a CPU's allocator, of cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of PyTorch's ways to say that a device has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Other allocators and libraries raise plain RuntimeErrors, which only their words tell apart.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def kv_space(model: Bagel, nbytes: int | None) -> SharedSlab:
    """Room for so many bytes of K/V on the model's device, allocated once.

    None: DEFAULT_KV_TOKENS, but at most half of a GPU's memory that is free now, and less where that leaves less than
    WORKING_BYTES; at most a quarter of the host's for a CPU.
    Ranks of one model have the same room, that of the one with the least: what fits is then the same on all of them.
    Raises ConfigError for less than a token, OutOfMemory if the device does not have it.
    """
    token = model.kv_shape.token_bytes(model.dtype)
    if nbytes is None:
        nbytes = min(DEFAULT_KV_TOKENS * token, _share(model.device))
    elif nbytes < token:
        raise ConfigError(f"kv_device_bytes is {nbytes}; K/V of one token of this model take {token}")
    tokens = torch.tensor([nbytes // token], device=model.device)
    tokens = model.groups.world.gather(tokens)
    try:
        return _slab(model, int(tokens.min()))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{model.device} has no {nbytes} bytes free for K/V; lower kv_device_bytes") from error


def kv_space_of(model: Bagel, lengths: Sequence[int]) -> SharedSlab:
    """Room for intervals of these lengths, in tokens, and no more."""
    ahead = model.language_model.backend.read_ahead
    return _slab(model, sum(length + ahead for length in lengths))


def _slab(model: Bagel, tokens: int) -> SharedSlab:
    ahead = model.language_model.backend.read_ahead
    return SharedSlab(model.kv_shape, dtype=model.dtype, device=model.device, size=tokens, read_ahead=ahead)


def _share(device: torch.device) -> int:
    """The most bytes that K/V get by default."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]  # the weights are loaded already
        return max(free // 4, min(free // 2, free - WORKING_BYTES))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
