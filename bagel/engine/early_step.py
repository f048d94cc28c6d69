"""A picture's first step, computed layer by layer while the K/V of later layers are still on their way.

A layer attends to its own K/V alone. So what a network takes longest for, the last layers of an image that is new,
is waited for while the device computes the first ones.
"""

from __future__ import annotations

import time
from math import ceil

from torch import Tensor

from bagel.engine.clock import Piece, mark
from bagel.engine.step_graphs import StepInputs
from bagel.model.attention import KvSlab, Rows
from bagel.model.bagel import Bagel
from bagel.model.layers import Hidden

LEAST_SHARE = 1 / 3
"""Of the layers, that a first step waits for. A layer's K/V of a new image take longer to come than a step takes to
compute it (on an H200 16 ms and 12), so a step that begins now is nowhere short of them, and ends as soon. One that
began with the first layer would only wait for others, and take turns with a prefill that has the same device."""


def least_layers(count: int) -> int:
    """How many of a model's layers must be there for a first step to begin."""
    return ceil(LEAST_SHARE * count)


class EarlyStep:
    """The forward of `row_velocities`, in pieces. Of a model that no ranks share, whose weights are all resident.

    Its memory is that of one step's hidden states; steps of other pictures may be taken between two pieces.
    """

    def __init__(self, model: Bagel, delimiters: Tensor, inputs: StepInputs, rows: Rows, slab: KvSlab) -> None:
        """As row_velocities. inputs: of a step that is to be taken, which must not change meanwhile."""
        self._model, self._rows, self._slab = model, rows, slab
        self._und = Hidden(delimiters.expand(len(inputs.x), -1, -1))
        self._gen: Hidden | None = Hidden(model.embed_latents(inputs.x, inputs.t, inputs.position_ids))
        self.began_at = time.monotonic()
        self.layers = 0
        """Those that are launched."""
        self.pieces: list[Piece] = []
        """When they were computed; what the copies of K/V were waited for is not in it."""

    def advance(self, layers: int) -> None:
        """Launch the first so many layers, as far as they are not: work on the present stream sees their K/V."""
        if layers <= self.layers:
            return
        decoder, device = self._model.language_model, self._model.device
        begin, todo = mark(device), range(self.layers, layers)
        self._und, self._gen = decoder.some_layers(todo, self._und, self._gen, self._rows, self._slab)
        self.layers = layers
        self.pieces.append((begin, mark(device)))

    def velocities(self) -> Tensor:
        """The velocities of all rows, [rows, bucket, features] float32. All K/V must be there."""
        self.advance(len(self._model.language_model.layers))
        assert self._gen is not None
        return self._model.velocity(self._gen.sum())
