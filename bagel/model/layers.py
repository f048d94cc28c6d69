"""The layers that every part of the network is made of.

Types: matrix products run in their weights' type; norms, what is added up between layers, and the small modules
around latents stay in float32. Under bfloat16 that keeps the error at about 0.7 of the reference's own.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.model.kernels import Kernels, rms_norm


class Linear(nn.Linear):
    """A linear layer that computes in its weight's type, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def linear(in_features: int, out_features: int, *, bias: bool) -> Linear:
    """The one place that makes a linear layer, so that quantisation and sharding have one seam."""
    return Linear(in_features, out_features, bias=bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, of float32 and in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding, halves convention (Su et al. 2021, as in Qwen2)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        self.reset()

    def reset(self) -> None:
        """(Re)compute the frequencies; needed after a module was moved off the meta device."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=self.inv_freq.device).float()
        self.inv_freq.copy_(1.0 / self.theta ** (exponent / self.head_dim))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [...] int64 -> cos, sin [..., head_dim] float32."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix product."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, kernels: Kernels) -> Tensor:
        return cast(Tensor, self.down_proj(kernels.gate(self.gate_up_proj(x))))


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x))), with biases: the ViT's MLP and the connector."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = linear(in_features, hidden, bias=True)
        self.fc2 = linear(hidden, out_features, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class PositionTable(nn.Module):
    """A frozen 2-D sin-cos table [side * side, width], taken from the checkpoint (it is rounded there)."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids [n] -> rows [n, width]."""
        return self.pos_embed[position_ids]


def grid_position_ids(rows: int, columns: int, side: int) -> Tensor:
    """Ids row * side + column of a rows x columns grid in the corner of a side x side table, row-major, int64."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()
