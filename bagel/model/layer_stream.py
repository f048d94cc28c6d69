"""Weights of decoder layers on their way to where they compute: the next layers' are copied while one computes.

The device has memory for two layers, which the layers take in turn. So a layer's parameters are views of one of the two
for good, and the arithmetic is that of a resident model, bit for bit. Where the weights come from is for others to say:
from the host's memory (bagel.model.offload), or from the ranks that divide them (bagel.model.divided).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

ALIGNMENT = 256
"""Bytes that every tensor begins at a multiple of, as kernels expect of memory that PyTorch allocates."""
BUFFERS = 2


class ExpertWeights(Protocol):
    """One expert's weights in all layers that move. nbytes: of its largest layer, once it is whole."""

    nbytes: int

    def move(self) -> None:
        """Let the parameters be views of the device's buffers; what they hold so far is kept where copies take it."""
        ...

    def copy(self, at: int) -> None:
        """Copy the weights of the layer with this number among those that move to its buffer."""
        ...


def aligned(nbytes: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class _Turnstile:
    """Keeps copies and computation of the two buffers apart: a copy waits for the layer before it, and a layer for it.

    The host waits for neither.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._free = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]

    def release(self, buffer: int) -> None:
        """What the current stream has been given so far is all that reads this buffer."""
        self._free[buffer].record(torch.cuda.current_stream(self._device))

    @contextmanager
    def copying(self, buffer: int) -> Iterator[None]:
        """Copies that are launched inside go to a stream of their own, after the buffer's last reader."""
        self._stream.wait_event(self._free[buffer])
        with torch.cuda.stream(self._stream):
            yield
        self._copied[buffer].record(self._stream)

    def await_copy(self, buffer: int) -> None:
        """Let the current stream wait for the last copy into this buffer."""
        torch.cuda.current_stream(self._device).wait_event(self._copied[buffer])


class LayerStream:
    """The weights of a decoder's layers on their way to the device. `move` once they have values.

    layers: all; moving: those of them whose weights move, even in number, so that each has a buffer for good. experts:
    a forward needs the first alone, or all. kept_bytes: of their weights where they are copied from, which on_device
    says to be the device, too. One forward at a time.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        moving: Sequence[nn.Module],
        experts: Sequence[ExpertWeights],
        device: torch.device,
        *,
        kept_bytes: int,
        on_device: bool,
    ) -> None:
        assert len(moving) % BUFFERS == 0
        self._layers, self.moving, self._experts = layers, moving, experts
        self.kept_bytes, self.on_device = kept_bytes, on_device
        self._turns = {id(layer): at for at, layer in enumerate(self.moving)}
        # The layer in each buffer, by its number among those that move, and how many of its experts are there.
        self._held: list[tuple[int, int]] = [(-1, 0)] * BUFFERS
        self._turnstile = _Turnstile(device) if device.type == "cuda" else None

    @property
    def device_bytes(self) -> int:
        """Memory of the device for layers that move."""
        return BUFFERS * sum(each.nbytes for each in self._experts)

    def move(self) -> None:
        """Begin to serve: from now on the layers' parameters are where they compute."""
        for each in self._experts:
            each.move()

    def supply(self, *, every_expert: bool) -> Iterator[nn.Module]:
        """The layers in their order, each with its weights on the device, as the current stream sees it.

        The caller has launched a layer's work when it asks for the next. every_expert: else the first alone.
        """
        experts = len(self._experts) if every_expert else 1
        for at in range(min(BUFFERS, len(self.moving))):
            # Most often they are there already: the last forward has asked for them.
            if not self._holds(at, experts):
                self._release(at)
                self._fetch(at, experts)
        for layer in self._layers:
            at = self._turns.get(id(layer), -1)
            if at < 0:
                yield layer
                continue
            if self._turnstile is not None:
                self._turnstile.await_copy(at % BUFFERS)
            yield layer
            self._release(at)
            following = (at + BUFFERS) % len(self.moving)
            if not self._holds(following, experts):
                self._fetch(following, experts)

    def _holds(self, at: int, experts: int) -> bool:
        held, there = self._held[at % BUFFERS]
        return held == at and there >= experts

    def _release(self, at: int) -> None:
        """A layer's buffer may be overwritten after what has been launched so far."""
        if self._turnstile is not None:
            self._turnstile.release(at % BUFFERS)

    def _fetch(self, at: int, experts: int) -> None:
        """Launch the copies of a layer's weights into its buffer."""
        self._held[at % BUFFERS] = (at, experts)
        if self._turnstile is None:
            self._copy(at, experts)
            return
        with self._turnstile.copying(at % BUFFERS):
            self._copy(at, experts)

    def _copy(self, at: int, experts: int) -> None:
        for each in self._experts[:experts]:
            each.copy(at)
