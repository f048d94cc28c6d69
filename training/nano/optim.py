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
        """Matrices whose name has `.layers.` in it take Muon; those of one shape lie side by side."""
        parameters = sorted(named, key=lambda each: _matrix_shape(*each))
        self.rates = rates
        device = parameters[0][1].device
        self.flat = torch.cat([p.detach().float().flatten() for _, p in parameters])
        self.grad = torch.zeros_like(self.flat)
        self.matrices: dict[tuple[int, int], tuple[int, int]] = {}
        start = 0
        for name, parameter in parameters:
            stop = start + parameter.numel()
            parameter.data = self.flat[start:stop].view(parameter.shape)
            parameter.grad = self.grad[start:stop].view(parameter.shape)
            shape = _matrix_shape(name, parameter)
            if all(shape):
                self.matrices[shape] = (self.matrices.get(shape, (start, stop))[0], stop)
            start = stop
        self.ema = self.flat.clone()
        self.first, self.second, self.momentum = (torch.zeros_like(self.flat) for _ in range(3))
        self.count, self.scale = torch.zeros((), device=device), torch.ones((), device=device)
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One step with the rates times `scale`; the host reads nothing, so that a step can be captured as a graph."""
        self.count += 1
        rates, n = self.rates, self.count
        torch.linalg.vector_norm(self.grad, out=self.norm)
        finite = self.norm.isfinite()
        self.skipped += (~finite).float()
        self.grad.nan_to_num_(0.0, 0.0, 0.0)
        self.grad.mul_(
            torch.where(finite, (rates.clip / (self.norm + 1e-6)).clamp(max=1.0), torch.zeros_like(self.norm))
        )
        go = self.scale * finite
        self.first.lerp_(self.grad, 0.1)
        self.second.lerp_(self.grad.square(), 0.05)
        update = (self.first / (1 - 0.9**n)) / ((self.second / (1 - 0.95**n)).sqrt() + 1e-8)
        update.mul_(rates.adam)
        self.momentum.mul_(0.95).add_(self.grad)
        nesterov = self.grad + 0.95 * self.momentum
        for (rows, columns), (a, b) in self.matrices.items():
            change = orthogonal(nesterov[a:b].view(-1, rows, columns)).mul_(0.2 * max(rows, columns) ** 0.5).flatten()
            update[a:b] = change.add_(self.flat[a:b], alpha=rates.decay).mul_(rates.muon)
        self.flat.sub_(update.mul_(go))
        self.ema.lerp_(self.flat, 1 - ((1 + n) / (10 + n)).clamp(max=rates.ema))

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
        for name in ("flat", "ema", "first", "second", "momentum", "count"):
            saved = state[name]
            assert isinstance(saved, Tensor)
            getattr(self, name).copy_(saved)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their EMA; twice is nothing."""
        kept = self.flat.clone()
        self.flat.copy_(self.ema)
        self.ema.copy_(kept)


def _matrix_shape(name: str, parameter: Tensor) -> tuple[int, int]:
    """The shape of a matrix that Muon takes; zeros for others."""
    return (parameter.shape[0], parameter.shape[1]) if parameter.dim() == 2 and ".layers." in name else (0, 0)


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices, [n, rows, columns]."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)  # a CPU has no fast bfloat16
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out
