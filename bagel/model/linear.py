"""Linear layers: one factory makes every one of the network.

A layer knows the tensors of the checkpoint that it is made of, how it is split over tensor-parallel ranks, and the
number format that it computes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.errors import ConfigError
from bagel.model.fp8 import FP8, MULTIPLE, Scaled, scaled_product
from bagel.model.kernels import Activations
from bagel.parallel.groups import UNDIVIDED, Group, Groups
from bagel.parallel.mesh import Rank, Share


class Split(StrEnum):
    """How ranks divide a layer.

    column: each computes some of the outputs; row: each computes all outputs from some of the inputs, and the ranks'
    results are added up; none: each computes all of it.
    """

    COLUMN = "column"
    ROW = "row"
    NONE = "none"


class Linear(nn.Linear):
    """A rank's share of a linear layer. It computes in its weight's type, whatever comes in.

    outputs: layers of the checkpoint by name, without ".weight" and ".bias", whose outputs follow one another here, and
    the share of each; inputs: the share of their inputs.
    """

    def __init__(
        self, outputs: Mapping[str, Share], inputs: Share, split: Split, *, bias: bool, dtype: torch.dtype
    ) -> None:
        # Layers that read the same input, like q, k and v, are one matrix product.
        super().__init__(inputs.count, sum(share.count for share in outputs.values()), bias=bias, dtype=dtype)
        self.outputs, self.inputs, self.split = outputs, inputs, split

    def forward(self, x: Tensor) -> Tensor:
        return self.some(x, slice(None))

    def some(self, x: Activations, outputs: slice) -> Tensor:
        """As forward, of these outputs alone."""
        assert isinstance(x, Tensor)
        # Norms give float32 unless asked otherwise; the weights may be bfloat16.
        bias = None if self.bias is None else self.bias[outputs]
        return F.linear(x.to(self.weight.dtype), self.weight[outputs], bias)


class SummedLinear(Linear):
    """A row split that adds the ranks' results up by itself, and has a bias, which is added once."""

    def __init__(self, group: Group, name: str, inputs: Share, outputs: int, *, dtype: torch.dtype) -> None:
        super().__init__({name: Share.all(outputs)}, inputs, Split.ROW, bias=True, dtype=dtype)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        return self._group.add_up(F.linear(x.to(self.weight.dtype), self.weight)) + self.bias


class Fp8Linear(Linear):
    """A layer whose weight is e4m3, with one scale an output (bagel.model.fp8). It takes and gives whole tokens.

    Of a row split each rank scales its own columns: it need not read the others' bytes, and rounds no coarser than one
    rank would.
    """

    def __init__(
        self, outputs: Mapping[str, Share], inputs: Share, split: Split, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(outputs, inputs, split, bias=bias, dtype=dtype)
        if self.in_features % MULTIPLE or self.out_features % MULTIPLE:
            raise ConfigError(
                f"quantization fp8 needs inputs and outputs that are multiples of {MULTIPLE}; this rank's share of "
                f"{next(iter(outputs))} has {self.in_features} and {self.out_features}; leave it out, or use fewer "
                "tensor-parallel ranks"
            )
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=FP8), requires_grad=False)
        # A parameter of as many rows as the weight, so that ranks which divide its rows divide both alike.
        scale = torch.empty(self.out_features, 1, dtype=torch.float32)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Scaled) -> Tensor:  # type: ignore[override]
        """x [..., inputs], from `Kernels` -> [..., outputs] bfloat16."""
        return self.some(x, slice(None))

    def some(self, x: Activations, outputs: slice) -> Tensor:
        """As forward, of these outputs alone."""
        assert isinstance(x, Scaled)
        bias = None if self.bias is None else self.bias[outputs]
        return scaled_product(x, self.weight[outputs], self.scale[outputs], bias)


class Quantization(StrEnum):
    """Number formats of the decoder's weights, other than the model's type."""

    FP8 = "fp8"


@dataclass(frozen=True)
class LinearFactory:
    """Makes the linear layers of one rank's network.

    dtype: the type of the model's matrix products; quantization: the format of the decoder layers' weights instead.
    """

    dtype: torch.dtype
    groups: Groups = UNDIVIDED
    quantization: Quantization | None = None

    @property
    def rank(self) -> Rank:
        """The rank whose shares the layers have."""
        return self.groups.rank

    def column(self, outputs: Mapping[str, Share], inputs: int, *, bias: bool) -> Linear:
        """A layer of which this rank computes a share of the outputs, of one or more layers of the checkpoint."""
        return self._make(outputs, Share.all(inputs), Split.COLUMN, bias=bias)

    def row(self, name: str, inputs: Share, outputs: int) -> Linear:
        """A layer of which this rank computes all outputs from a share of the inputs.

        It has no bias, which ranks would add once each.
        """
        return self._make({name: Share.all(outputs)}, inputs, Split.ROW, bias=False)

    def plain_column(self, outputs: Mapping[str, Share], inputs: int) -> Linear:
        """As `column`, with a bias, of a layer outside of the decoder: never quantised."""
        split = Split.NONE if all(share.count == share.whole for share in outputs.values()) else Split.COLUMN
        return Linear(outputs, Share.all(inputs), split, bias=True, dtype=self.dtype)

    def summed_row(self, name: str, inputs: Share, outputs: int) -> Linear:
        """As `row`, of a layer outside of the decoder: it adds the ranks' results up by itself, then its bias."""
        if inputs.count == inputs.whole:
            return self.whole(name, inputs.whole, outputs, bias=True)
        return SummedLinear(self.groups.tp, name, inputs, outputs, dtype=self.dtype)

    def whole(
        self, names: str | Sequence[str], inputs: int, outputs: int, *, bias: bool, exact: bool = False
    ) -> Linear:
        """A layer that every rank computes in full; with several names, each has so many outputs.

        exact: in float32, whatever the model's type is.
        """
        named = (names,) if isinstance(names, str) else names
        shares = dict.fromkeys(named, Share.all(outputs))
        return self._make(shares, Share.all(inputs), Split.NONE, bias=bias, exact=exact)

    def _make(
        self, outputs: Mapping[str, Share], inputs: Share, split: Split, *, bias: bool, exact: bool = False
    ) -> Linear:
        """The one place that chooses a layer's number format.

        Only split layers are quantised: they are the decoder's, nearly all of the weights. What every rank has whole is
        small, or is the model's first or last layer, whose errors cost most.
        """
        if self.quantization is Quantization.FP8 and split is not Split.NONE:
            return Fp8Linear(outputs, inputs, split, bias=bias, dtype=self.dtype)
        return Linear(outputs, inputs, split, bias=bias, dtype=torch.float32 if exact else self.dtype)
