"""Capturing forwards as CUDA graphs: a graph is one launch, where kernel by kernel the device waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 2
"""Forwards before a capture: they compile kernels and let libraries allocate, which a capture may not."""


class GraphMaker:
    """Makes graphs that are replayed one at a time, so they share the memory of their intermediate results."""

    def __init__(self, device: torch.device) -> None:
        # One stream for all: libraries keep a workspace for each stream that they have seen.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, forward: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A forward as a graph, and what it returned, which the next replay of any of these graphs may overwrite.

        The forward runs before it is captured, so its inputs must be real: it writes K/V.
        """
        current = torch.cuda.current_stream(self._stream.device)
        # The inputs may still be written on the caller's stream.
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    forward()
        finally:
            # After an error too: the caller then frees tensors that this stream may still use.
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The autoencoder's thread may allocate meanwhile, which must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = forward()
        return graph, result
