"""An optimizer over one flat buffer: Muon for the matrices of the layers, AdamW for the rest, and an EMA of all.

Muon: Jordan et al. 2024, scaled to AdamW's update size (Liu et al. 2025). A step launches few kernels and never waits
for the device. Gradients that are not finite change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of Muon's Newton-Schulz step
_STATE = ("flat", "ema", "first", "second", "momentum", "count")


@dataclass(frozen=True)
class Rates:
    """The highest learning rates, the weight decay, the norm at which gradients are clipped, and the EMA's decay."""

    muon: float = 2e-3
    adam: float = 1.5e-3
    decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.9995


class FlatOptimizer:
    """Owns the parameters: they become views of one buffer, and their gradients views of another."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rates: Rates) -> None:
        """Take over the parameters; matrices with `.layers.` in their name take Muon."""
        # Sorted by shape, so that Muon handles all matrices of one shape in one batch.
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
        """One step with the rates times `scale`. The host reads nothing, so that a graph can capture the step."""
        self.count += 1
        rates, n = self.rates, self.count
        torch.linalg.vector_norm(self.grad, out=self.norm)
        finite = self.norm.isfinite()
        self.skipped += (~finite).float()
        self.grad.nan_to_num_(0.0, 0.0, 0.0)  # a NaN times zero would still be a NaN
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
        # The EMA's decay rises with the steps, so that it soon forgets the initial weights.
        self.ema.lerp_(self.flat, 1 - ((1 + n) / (10 + n)).clamp(max=rates.ema))

    def state(self) -> dict[str, object]:
        """Everything that a later run needs to continue."""
        return {name: getattr(self, name) for name in _STATE}

    def load(self, state: Mapping[str, object]) -> None:
        """Continue from the state of a model with the same parameters."""
        for name in _STATE:
            saved = state[name]
            assert isinstance(saved, Tensor)
            getattr(self, name).copy_(saved)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their EMA; a second call undoes the first."""
        kept = self.flat.clone()
        self.flat.copy_(self.ema)
        self.ema.copy_(kept)


def _matrix_shape(name: str, parameter: Tensor) -> tuple[int, int]:
    """The shape of a parameter that Muon takes; (0, 0) for any other."""
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
