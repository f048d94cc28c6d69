"""Decoder layers whose weights lie in the host's memory, a flat piece of it for each expert of each layer.

On a CPU the same code copies from memory to memory; only tests want that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bagel.model.layer_stream import BUFFERS, LayerStream, aligned

KEPT_OF = 7
"""One layer of so many stays on the device: a step waits for the link, so a little memory saves much time."""


def host_stream(layers: Sequence[nn.Module], experts: Sequence[Sequence[str]], device: torch.device) -> LayerStream:
    """Let the weights of layers lie in the host's memory; with their values, if they have any.

    experts: of each the names of its modules in a layer.
    """
    kept = set(kept_layers(len(layers)))
    moving = [layer for i, layer in enumerate(layers) if i not in kept]
    modules = [[[getattr(layer, name) for name in names] for layer in moving] for names in experts]
    weights = [_HostWeights(each, device) for each in modules]
    kept_bytes = len(moving) * sum(each.nbytes for each in weights)
    return LayerStream(layers, moving, weights, device, kept_bytes=kept_bytes, on_device=False)


def kept_layers(count: int) -> list[int]:
    """Which of so many layers stay on the device. The others are even in number, so that each has a buffer for good."""
    kept = count // KEPT_OF
    kept += (count - kept) % BUFFERS
    # Spread evenly: while one of them computes, the copies gain on the computation.
    return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]


class _HostWeights:
    """One expert's weights in all layers that move: flat in the host's memory, and two buffers on the device.

    layers: of each the modules that this expert has there. Their parameters lie in the host's memory until `move`.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module]], device: torch.device) -> None:
        self._device = device
        self._places = [list(_places(modules)) for modules in layers]
        self.nbytes = max((end for places in self._places for *_, end in places), default=0)
        cuda = device.type == "cuda"
        self._hosts = [
            torch.empty(
                self.nbytes, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu", pin_memory=cuda
            )
            for _ in layers
        ]
        self._buffers: list[Tensor] = []
        for places, host in zip(self._places, self._hosts, strict=True):
            self._point(places, host, keep=True)

    def move(self) -> None:
        """As `ExpertWeights`; what the parameters hold is in the host's memory."""
        self._buffers = [torch.empty(self.nbytes, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
        for at, places in enumerate(self._places):
            self._point(places, self._buffers[at % BUFFERS], keep=False)

    def copy(self, at: int) -> None:
        """As `ExpertWeights`."""
        self._buffers[at % BUFFERS].copy_(self._hosts[at], non_blocking=True)

    @staticmethod
    def _point(places: Sequence[tuple[nn.Module, str, int, int]], memory: Tensor, *, keep: bool) -> None:
        """Put parameters into memory; keep: with their values, if they have any."""
        for module, name, begin, end in places:
            old: Tensor = getattr(module, name)
            view = memory[begin:end].view(old.dtype).view(old.shape)
            if keep and not old.is_meta:
                view.copy_(old)
            setattr(module, name, nn.Parameter(view, requires_grad=False))


def _places(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, int, int]]:
    """Where each parameter of an expert lies in its flat memory: module, name, first byte and the byte after it."""
    begin = 0
    for module in (each for root in modules for each in root.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            end = begin + parameter.nbytes
            yield module, name, begin, end
            begin = aligned(end)
