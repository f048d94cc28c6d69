"""Run training steps as a CUDA graph: capture the step once, then replay it on new data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
AHEAD = 3
"""How many steps the host may be ahead of the device."""
Losses = dict[str, Tensor]
StepFn = Callable[[Mapping[str, Tensor]], Losses]


class Steps:
    """Runs a step on batches whose shapes never change; on CUDA as a graph, elsewhere directly."""

    def __init__(self, step: StepFn, device: torch.device) -> None:
        self._step, self._device = step, device
        self._inputs: dict[str, Tensor] = {}
        self._losses: Losses = {}
        self._graph: Any = None
        self._under_way: deque[torch.cuda.Event] = deque()

    def __call__(self, packed: Mapping[str, Tensor]) -> Losses:
        """Run one step; the next one overwrites the losses that it returns."""
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
        if len(self._under_way) > AHEAD:  # bounds the pinned memory of batches that wait for their copy
            self._under_way.popleft().synchronize()
        return self._losses

    def _capture(self) -> None:
        """Capture the step, after a few runs on a side stream."""
        # The runs compile and allocate everything, which a capture forbids.
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
