"""All learned parameters in one flat buffer: Muon for the matrices of the layers, AdamW for the rest, and their EMA.

Muon: Jordan et al. 2024, scaled to AdamW's update size (Liu et al. 2025). A step takes few kernels and never waits for
the device; gradients that are not finite make it no step at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True)
class Rates:
    """Learning rates at their highest, weight decay, and the norm that gradients are clipped to."""

    muon: float = 2e-3
    adam: float = 1.5e-3
    decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.9995


class FlatOptimizer:
    """Owns the parameters: they become views of one buffer, their gradients of another."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rates: Rates) -> None:
        """Matrices whose name has `.layers.` in it take Muon."""
        parameters = list(named)
        self.rates, self.count = rates, 0
        device = parameters[0][1].device
        self.flat = torch.cat([p.detach().float().flatten() for _, p in parameters])
        self.grad = torch.zeros_like(self.flat)
        self.matrices: dict[tuple[int, int], list[tuple[int, int]]] = {}
        start = 0
        for name, parameter in parameters:
            stop = start + parameter.numel()
            parameter.data = self.flat[start:stop].view(parameter.shape)
            parameter.grad = self.grad[start:stop].view(parameter.shape)
            if parameter.dim() == 2 and ".layers." in name:
                self.matrices.setdefault((parameter.shape[0], parameter.shape[1]), []).append((start, stop))
            start = stop
        self.ema = self.flat.clone()
        self.first, self.second, self.momentum = (torch.zeros_like(self.flat) for _ in range(3))
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step with the rates times scale."""
        self.count += 1
        rates, n = self.rates, self.count
        self.norm = torch.linalg.vector_norm(self.grad)
        finite = self.norm.isfinite()
        self.skipped += (~finite).float()
        self.grad.nan_to_num_(0.0, 0.0, 0.0)
        self.grad.mul_(
            torch.where(finite, (rates.clip / (self.norm + 1e-6)).clamp(max=1.0), torch.zeros_like(self.norm))
        )
        go = finite.float()
        self.first.lerp_(self.grad, 0.1)
        self.second.lerp_(self.grad.square(), 0.05)
        update = (self.first / (1 - 0.9**n)) / ((self.second / (1 - 0.95**n)).sqrt() + 1e-8)
        update.mul_(rates.adam * scale)
        self.momentum.mul_(0.95).add_(self.grad)
        nesterov = self.grad + 0.95 * self.momentum
        for (rows, columns), places in self.matrices.items():
            stacked = torch.stack([nesterov[a:b] for a, b in places]).view(-1, rows, columns)
            change = orthogonal(stacked).mul_(rates.muon * scale * 0.2 * max(rows, columns) ** 0.5).flatten(1)
            for each, (a, b) in zip(change, places, strict=True):
                update[a:b] = torch.add(each, self.flat[a:b], alpha=rates.muon * scale * rates.decay)
        self.flat.sub_(update.mul_(go))
        self.ema.lerp_(self.flat, 1 - min(rates.ema, (1 + n) / (10 + n)))

    def state(self) -> dict[str, object]:
        """Everything needed to go on."""
        return {
            "flat": self.flat,
            "ema": self.ema,
            "first": self.first,
            "second": self.second,
            "momentum": self.momentum,
            "count": self.count,
        }

    def load(self, state: Mapping[str, object]) -> None:
        """Go on from a state of a model with the same parameters."""
        for name in ("flat", "ema", "first", "second", "momentum"):
            saved = state[name]
            assert isinstance(saved, Tensor)
            getattr(self, name).copy_(saved)
        self.count = int(str(state["count"]))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their EMA; twice is nothing."""
        kept = self.flat.clone()
        self.flat.copy_(self.ema)
        self.ema.copy_(kept)


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices, [n, rows, columns]."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out
