"""Large matrix products of a layer on a GPU, in parts that leave fewer of its multiprocessors idle at their end."""

from __future__ import annotations

from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from bagel.model.fp8 import Scaled
from bagel.model.kernels import Activations
from bagel.model.linear import Linear

HOPPER = 9
"""The major compute capability of the GPUs that this was measured on."""
TILE = 128, 256
"""Tokens and outputs that a multiprocessor of such a GPU computes at a time in cuBLAS's large products."""
LEAST_WAVES = 3
SHORT = 0.5
"""A last wave of tiles on so many of the multiprocessors, or fewer, leaves enough idle for parts to be faster."""


class Product(Protocol):
    """Computes a linear layer without a bias: x [tokens, inputs] -> [tokens, outputs] in the weight's type."""

    def __call__(self, linear: Linear, x: Activations) -> Tensor: ...


def whole_product(linear: Linear, x: Activations) -> Tensor:
    """As one product: on any device."""
    product: Tensor = linear(x)
    return product


class WholeWaves:
    """As two products, of which the first fills all multiprocessors to its end.

    cuBLAS gives each multiprocessor one tile at a time. If the last wave of tiles is a short one, most of the device
    waits for it. Then all but the last whole wave and the rest are computed apart, for which cuBLAS takes tiles of
    other sizes. Each output's sum is computed in the same order either way, so the results are equal to the bit: the
    rest is never so small that cuBLAS would divide its sums.
    """

    def __init__(self, multiprocessors: int) -> None:
        self._multiprocessors = multiprocessors

    def __call__(self, linear: Linear, x: Activations) -> Tensor:
        if isinstance(x, Scaled) or (cut := self.cut(len(x), linear.out_features)) is None:
            return whole_product(linear, x)
        tokens, outputs = cut
        product = x.new_empty(len(x), linear.out_features)
        if outputs == linear.out_features:
            for part in slice(tokens), slice(tokens, None):
                torch.mm(x[part], linear.weight.t(), out=product[part])
        else:
            for part in slice(outputs), slice(outputs, None):
                torch.mm(x, linear.weight[part].t(), out=product[:, part])
        return product

    def cut(self, tokens: int, outputs: int) -> tuple[int, int] | None:
        """Tokens and outputs of the first product, one of them all that there are; None: one product is better."""
        rows, columns = ceil(tokens / TILE[0]), ceil(outputs / TILE[1])
        waves, last = divmod(rows * columns, self._multiprocessors)
        if waves < LEAST_WAVES or not 0 < last <= SHORT * self._multiprocessors:
            return None
        tiles = (waves - 1) * self._multiprocessors
        of_rows, of_columns = tiles // columns, tiles // rows
        # Along the side where the tiles fill these waves better.
        if of_rows * columns > of_columns * rows:
            return of_rows * TILE[0], outputs
        return tokens, of_columns * TILE[1]


def choose_product(device: torch.device) -> Product:
    """What is faster on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return WholeWaves(properties.multi_processor_count) if properties.major == HOPPER else whole_product
