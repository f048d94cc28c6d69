"""The layers that every part of the network is made of.

Matrix products run in their weights' type. Norms, the residual stream and the small modules around latents stay in
float32: under bfloat16 that keeps the error at about 0.7 of the reference's own.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.model.backend import LayerBackend
from bagel.model.kernels import TORCH, Activations, Kernels, Rope
from bagel.model.linear import LinearFactory
from bagel.parallel.mesh import Share


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32. name: the checkpoint's."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))

    def forward(self, x: Tensor, kernels: Kernels = TORCH, dtype: torch.dtype = torch.float32) -> Activations:
        """x [..., size] float32 -> its norm in dtype, as Kernels.norm."""
        return kernels.norm(x, self.weight, self.eps, dtype)


class Hidden(NamedTuple):
    """Hidden states: the sum of x [..., hidden] float32 and delta [..., hidden] (None: nothing).

    The norm that comes next computes the sum, as it reads both in any case: a pass over memory less.
    """

    x: Tensor
    delta: Tensor | None = None

    def sum(self) -> Tensor:
        """Both, [..., hidden] float32."""
        return self.x if self.delta is None else self.x + self.delta


class AddedRMSNorm(nn.Module):
    """A sum and its RMS norm, which a kernel makes in one pass. name: the checkpoint's."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))

    def forward(self, hidden: Hidden, kernels: Kernels, dtype: torch.dtype) -> tuple[Tensor, Activations]:
        """The sum in float32, and its norm as Kernels.add_norm, both [..., size]."""
        if hidden.delta is None:
            return hidden.x, kernels.norm(hidden.x, self.weight, self.eps, dtype)
        return kernels.add_norm(hidden.x, hidden.delta, self.weight, self.eps, dtype)


class HeadNorms(nn.Module):
    """The RMS norms of each head's queries and keys, with the rotary embedding that follows. names: of q's and k's."""

    def __init__(self, names: tuple[str, str], head_dim: int, eps: float) -> None:
        super().__init__()
        self.names, self.eps = names, eps
        self.q_weight = nn.Parameter(torch.empty(head_dim, dtype=torch.float32))
        self.k_weight = nn.Parameter(torch.empty(head_dim, dtype=torch.float32))

    def forward(
        self, qkv: Tensor, rope: Rope, slots: Tensor, q: Tensor, kv: tuple[Tensor, Tensor], kernels: Kernels
    ) -> None:
        """Fill q [rows * n, heads, head_dim], and kv at slots, from qkv [rows, n, ...]; see Kernels.rotate."""
        kernels.rotate(qkv, (self.q_weight, self.k_weight), self.eps, rope, q, kv, slots)


class Rotary(nn.Module):
    """Rotary position embedding, halves convention (Su et al. 2021, as in Qwen2)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        # Not persistent: it is computed, and the checkpoint does not hold it.
        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the frequencies. A module that has just left the meta device needs it."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=self.inv_freq.device).float()
        self.inv_freq.copy_(1.0 / self.theta ** (exponent / self.head_dim))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [...] int64 -> cos, sin [..., head_dim] float32."""
        # In float32, as bfloat16 has too few digits to tell large positions apart.
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) over a rank's columns; gate and up are one matrix product."""

    def __init__(self, linears: LinearFactory, name: str, hidden: int, columns: Share) -> None:
        super().__init__()
        gate_up = {f"{name}.gate_proj": columns, f"{name}.up_proj": columns}
        self.gate_up_proj = linears.column(gate_up, hidden, bias=False)
        self.down_proj = linears.row(f"{name}.down_proj", columns, hidden)

    @property
    def takes(self) -> torch.dtype:
        """The type of the inputs, as Kernels names it."""
        return self.gate_up_proj.weight.dtype

    def forward(self, x: Activations, backend: LayerBackend) -> Tensor:
        gated = backend.kernels.gate(self.gate_up_proj(x), self.down_proj.weight.dtype)
        return backend.product(self.down_proj, gated)


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x))) over a rank's columns, with biases: the ViT's MLP and the connector."""

    def __init__(self, linears: LinearFactory, name: str, in_features: int, columns: Share, out_features: int) -> None:
        super().__init__()
        self.fc1 = linears.plain_column({f"{name}.fc1": columns}, in_features)
        self.fc2 = linears.summed_row(f"{name}.fc2", columns, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class PositionTable(nn.Module):
    """A frozen 2-D sin-cos table [side * side, width], taken from the checkpoint, which holds it rounded."""

    def __init__(self, side: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, width, dtype=dtype), requires_grad=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids [n] -> rows [n, width]."""
        return self.pos_embed[position_ids]


def grid_position_ids(rows: int, columns: int, side: int, device: torch.device) -> Tensor:
    """Ids row * side + column of a rows x columns grid in the corner of a side x side table, row-major, int64."""
    return (torch.arange(rows, device=device)[:, None] * side + torch.arange(columns, device=device)).flatten()
