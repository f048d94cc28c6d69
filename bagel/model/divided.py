"""Decoder layers whose weights some ranks divide (HSDP), and copy out of each other's memory as they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bagel.model.layer_stream import BUFFERS, LayerStream, aligned
from bagel.parallel.groups import Group
from bagel.parallel.hsdp import divide, local, rows_of
from bagel.parallel.peer_memory import exchange


def divided_stream(
    layers: Sequence[nn.Module], experts: Sequence[Sequence[str]], group: Group, device: torch.device
) -> LayerStream:
    """Keep this rank's rows of the weights of layers, which are on the meta device.

    experts: of each the names of its modules in a layer. The ranks call this at once, and the stream's `move` too.
    """
    # Of an odd number one is kept whole, so that each of the others has a buffer for good.
    moving = layers[: len(layers) // BUFFERS * BUFFERS]
    modules = [[[getattr(layer, name) for name in names] for layer in moving] for names in experts]
    divide((each for expert in modules for layer in expert for each in layer), group, device)
    weights = [_DividedWeights(each, group, device) for each in modules]
    kept_bytes = sum(each.kept_bytes for each in weights)
    return LayerStream(layers, moving, weights, device, kept_bytes=kept_bytes, on_device=True)


@dataclass(frozen=True)
class _Place:
    """A weight that is divided: whose it is, and its size when whole."""

    module: nn.Module
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def nbytes(self, rows: int) -> int:
        """Bytes of so many rows of it."""
        return rows * math.prod(self.shape[1:]) * self.dtype.itemsize

    def within(self, memory: Tensor, begin: int, rows: int) -> Tensor:
        """So many rows of it that lie at a byte of some memory."""
        return memory[begin : begin + self.nbytes(rows)].view(self.dtype).view(rows, *self.shape[1:])


class _DividedWeights:
    """One expert's weights in all layers that move: each rank's rows in its own memory, and two buffers for all rows.

    layers: of each the modules that this expert has there. Small parameters, like norms, are whole on every rank.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module]], group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        self._places = [list(_places(modules)) for modules in layers]
        self.nbytes = max(map(self._nbytes, self._places), default=0)
        self.kept_bytes = sum(self._nbytes(places, group.index) for places in self._places)
        self._copies: list[list[tuple[Tensor, Tensor]]] = []

    def move(self) -> None:
        """As `ExpertWeights`; what the parameters hold goes to memory that the other ranks read."""
        buffers = [torch.empty(self.nbytes, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
        # Layer by layer, so that no rank holds much of its part twice.
        self._copies = [self._share(places, buffers[at % BUFFERS]) for at, places in enumerate(self._places)]

    def copy(self, at: int) -> None:
        """As `ExpertWeights`."""
        for ours, theirs in self._copies[at]:
            ours.copy_(theirs, non_blocking=True)

    def _share(self, places: Sequence[_Place], buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Offer this rank's rows of a layer, and point its parameters to a buffer; where to copy what from."""
        group = self._group
        mine = torch.empty(max(self._nbytes(places, group.index), 1), dtype=torch.uint8, device=self._device)
        for place, begin, rows in self._laid_out(places, group.index):
            place.within(mine, begin, rows).copy_(local(getattr(place.module, place.name)))
        parts = exchange(group, mine)
        wholes = []
        for place, begin, rows in self._laid_out(places):
            wholes.append(place.within(buffer, begin, rows))
            setattr(place.module, place.name, nn.Parameter(wholes[-1], requires_grad=False))
        copies = []
        # Each rank begins with another one's rows, so that no link has two readers.
        for rank in ((group.index + step) % group.size for step in range(1, group.size + 1)):
            for whole, (place, begin, rows) in zip(wholes, self._laid_out(places, rank), strict=True):
                kept = rows_of(rank, group.size, len(whole))
                copies.append((whole[kept.start : kept.stop], place.within(parts[rank], begin, rows)))
        return copies

    def _laid_out(self, places: Sequence[_Place], rank: int | None = None) -> Iterator[tuple[_Place, int, int]]:
        """Weights of a layer in the order of their memory: each one's first byte and rows; those of a rank, or all."""
        begin = 0
        for place in places:
            rows = place.shape[0]
            rows = rows if rank is None else len(rows_of(rank, self._group.size, rows))
            yield place, begin, rows
            begin += aligned(place.nbytes(rows))

    def _nbytes(self, places: Sequence[_Place], rank: int | None = None) -> int:
        return sum(aligned(place.nbytes(rows)) for place, _, rows in self._laid_out(places, rank))


def _places(modules: Sequence[nn.Module]) -> Iterator[_Place]:
    for module in (each for root in modules for each in root.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                yield _Place(module, name, tuple(parameter.shape), parameter.dtype)
