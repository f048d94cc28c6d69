"""Training steps that the host only starts: captured once as a CUDA graph, then replayed on new data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
AHEAD = 3
"""Steps that the host may be ahead of the device."""
Losses = dict[str, Tensor]
StepFn = Callable[[Mapping[str, Tensor]], Losses]


class Steps:
    """Runs a step on batches of always the same shapes; on CUDA as a graph, elsewhere as it is."""

    def __init__(self, step: StepFn, device: torch.device) -> None:
        self._step, self._device = step, device
        self._inputs: dict[str, Tensor] = {}
        self._losses: Losses = {}
        self._graph: Any = None
        self._under_way: deque[torch.cuda.Event] = deque()

    def __call__(self, packed: Mapping[str, Tensor]) -> Losses:
        """One step; its losses are overwritten by the next one."""
        if self._device.type != "cuda":
            return self._step(packed)
        if self._graph is None:
            self._inputs = {name: each.to(self._device) for name, each in packed.items()}
            self._capture()
        for name, each in packed.items():
            self._inputs[name].copy_(each.pin_memory(), non_blocking=True)
        self._graph.replay()
        event = torch.cuda.Event()
        event.record()
        self._under_way.append(event)
        if len(self._under_way) > AHEAD:
            self._under_way.popleft().synchronize()
        return self._losses

    def _capture(self) -> None:
        """A few steps on a side stream, in which everything is compiled and allocated, then the capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._losses = self._step(self._inputs)
