"""Decoder layers whose weights lie in the host's memory: the next layer's are copied while one computes.

The device has memory for two layers, which the layers take in turn. So a layer's parameters are views of one of the two
for good, and a copy is one flat piece of memory for each expert. The arithmetic is that of a resident model, bit for
bit. On a CPU the same code copies from memory to memory; only tests want that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes that every tensor begins at a multiple of, as kernels expect of memory that PyTorch allocates."""
KEPT_OF = 7
"""One layer of so many stays on the device: a step waits for the link, so a little memory saves much time."""
BUFFERS = 2


def kept_layers(count: int) -> list[int]:
    """Which of so many layers stay on the device. The others are even in number, so that each has a buffer for good."""
    kept = count // KEPT_OF
    kept += (count - kept) % BUFFERS
    # Spread evenly: while one of them computes, the copies gain on the computation.
    return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]


class _Expert:
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
        """Let the parameters be views of the device's buffers; what they hold is in the host's memory."""
        self._buffers = [torch.empty(self.nbytes, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
        for at, places in enumerate(self._places):
            self._point(places, self._buffers[at % BUFFERS], keep=False)

    def copy(self, at: int) -> None:
        """Copy the weights of the layer with this number among those that move to the device."""
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
    """The weights of a decoder's layers on their way to the device.

    Made of layers that have no memory yet, or have values; `move` once they have values. One forward at a time.
    """

    def __init__(self, layers: Sequence[nn.Module], experts: Sequence[Sequence[str]], device: torch.device) -> None:
        """experts: of each the names of its modules in a layer; a forward needs the first alone, or all."""
        kept = set(kept_layers(len(layers)))
        self._layers = layers
        self.moving = [layer for i, layer in enumerate(layers) if i not in kept]
        self._turns = {id(layer): at for at, layer in enumerate(self.moving)}
        modules = [[[getattr(layer, name) for name in names] for layer in self.moving] for names in experts]
        self._experts = [_Expert(each, device) for each in modules]
        # The layer in each buffer, by its number among those that move, and how many of its experts are there.
        self._held: list[tuple[int, int]] = [(-1, 0)] * BUFFERS
        self._turnstile = _Turnstile(device) if device.type == "cuda" else None

    @property
    def host_bytes(self) -> int:
        """Weights in the host's memory."""
        return len(self.moving) * sum(each.nbytes for each in self._experts)

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


def _places(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, int, int]]:
    """Where each parameter of an expert lies in its flat memory: module, name, first byte and the byte after it."""
    begin = 0
    for module in (each for root in modules for each in root.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            end = begin + parameter.nbytes
            yield module, name, begin, end
            begin = -(-end // ALIGNMENT) * ALIGNMENT
