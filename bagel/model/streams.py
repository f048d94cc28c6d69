"""Two independent pieces of a layer's work: one after the other, or at once on two CUDA streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


class RunBoth(Protocol):
    """Calls both functions and returns what they returned.

    Neither may need what the other computes. Both have been launched in the caller's order when this returns: the
    caller goes on as if it had called one after the other.
    """

    def __call__(self, small: Callable[[], A], large: Callable[[], B]) -> tuple[A, B]: ...


def one_by_one(small: Callable[[], A], large: Callable[[], B]) -> tuple[A, B]:
    """One after the other: on any device."""
    return small(), large()


class SideBySide:
    """The small one on a stream of its own, beside the large one on the current stream.

    For a small one that reads many weights for few tokens: it waits for memory while the large one computes. The same
    operations run as one by one, so the results are the same.

    Memory is safe without `record_stream`. PyTorch's allocator gives memory that is freed to later work of the stream
    that it was allocated on, so a tensor must not be freed while the other stream may still use it:
    - The caller holds what it passes in until both streams have joined.
    - What the small one allocates and frees itself stays with its stream.
    - What the small one returns is freed to its stream, whose next work begins with a wait for the current stream, and
      so comes after all that the caller did with it.
    The join takes place after an error too, as the caller frees its tensors then.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __call__(self, small: Callable[[], A], large: Callable[[], B]) -> tuple[A, B]:
        """Launch the small one first, so that it is under way when the large one fills the device."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                first = small()
            second = large()
        finally:
            current.wait_stream(self._stream)
        return first, second
