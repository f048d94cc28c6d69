"""The first stage: train the autoencoder for flat colours, clean edges and latents of about unit variance.

The decoder learns to read noisy latents, so that small errors in a drawn latent leave the edges clean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.checkpoint.config import VaeConfig
from bagel.model.bagel import Bagel
from training.nano.batches import CODE
from training.nano.journal import Journal, Schedule
from training.nano.render import Renderer
from training.nano.steps import Losses, Steps
from training.nano.world import MAX_OBJECTS

KL, MOMENTS, EDGES = 2e-4, 0.05, 0.5
NOISE = 0.3
"""The most noise that the decoder's input gets beside the posterior's own, in units of the latent's spread."""
RATE = 1.5e-3


class VaeTrainer:
    """Runs training steps of the autoencoder on one device."""

    def __init__(self, model: Bagel, device: torch.device, *, compiled: bool, noise: float = NOISE) -> None:
        assert model.vae is not None
        self.noise = noise
        self.config, self.device = model.vae.config, device
        self.autoencoder: Any = model.vae.autoencoder
        self.autoencoder.to(memory_format=torch.channels_last)
        render = Renderer(device)
        self.render: Any = torch.compile(render.__call__, dynamic=False) if compiled else render
        self.loss: Any = torch.compile(vae_loss, dynamic=False) if compiled else vae_loss
        self.rate = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        cuda, learned = device.type == "cuda", self.autoencoder.parameters()
        self.optimizer = torch.optim.AdamW(
            learned, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda, capturable=cuda
        )

    def step(self, packed: Mapping[str, Tensor]) -> Losses:
        """Run one step; gradients that are not finite change nothing."""
        pixels = self._pictures(packed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss, parts = self.loss(self.autoencoder, self.config, pixels, self.noise)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        gradients = [each.grad for each in self.autoencoder.parameters() if each.grad is not None]
        # All on the device, so that a graph can capture it: a factor of zero skips the step.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        factor = torch.where(norm.isfinite(), (1 / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        for each in gradients:
            each.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(gradients, factor)
        self.optimizer.step()
        return {**{name: part.detach() for name, part in parts.items()}, "norm": norm}

    @torch.no_grad()
    def _pictures(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Draw the scenes of the tasks, a fifth of them in random colours."""
        # Random colours keep the autoencoder from learning just the eight named ones.
        codes = torch.cat([each[:, -CODE:] for each in packed.values()]).to(self.device)
        free = len(codes) // 5
        colours = torch.rand(free, 1 + MAX_OBJECTS, 3, device=self.device) * 2 - 1
        pixels = torch.cat((self.render(codes[:free], colours), self.render(codes[free:])))
        return pixels.contiguous(memory_format=torch.channels_last)


def train_vae(trainer: VaeTrainer, stream: Any, schedule: Schedule, journal: Journal) -> None:
    """Train until the schedule is over."""
    steps, step, logged = Steps(trainer.step, trainer.device), 0, 0.0
    while not schedule.over:
        trainer.rate.fill_(RATE * schedule.scale(step))
        before = time.monotonic()
        losses = steps(next(stream))
        if step == 0:
            journal.write(first_step=time.monotonic() - before)
            schedule.begin()
        step += 1
        if schedule.progress - logged > 0.04 or schedule.over:
            logged = schedule.progress
            journal.write(step=step, **{name: float(value) for name, value in losses.items()})


def vae_loss(autoencoder: Any, config: VaeConfig, pixels: Tensor, noise: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts: errors of pixels and edges, KL to a unit normal, and each channel's mean and spread."""
    mean, logvar = autoencoder.encoder(pixels).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 6)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    # Each picture gets its own amount of noise, from none to the most.
    much = noise / config.scale_factor * torch.rand(len(z), 1, 1, 1, device=z.device)
    decoded = autoencoder.decoder(z + much * torch.randn_like(z)).float()
    error = decoded - pixels
    pixel = error.abs().mean() + error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    latent_mean = config.scale_factor * (mean - config.shift_factor)
    latent_logvar = logvar + 2 * math.log(config.scale_factor)
    kl = 0.5 * (latent_mean.square() + latent_logvar.exp() - 1 - latent_logvar).mean()
    latent = config.scale_factor * (z - config.shift_factor)
    spread, centre = latent.std(dim=(0, 2, 3)), latent.mean(dim=(0, 2, 3))
    moments = (centre.square() + (spread - 1).square()).mean()
    loss = pixel + EDGES * edges + KL * kl + MOMENTS * moments
    worst = F.relu(error.abs() - 0.1).gt(0).float().mean()
    return loss, {
        "l1": error.abs().mean(),
        "edges": edges,
        "far": worst,
        "kl": kl,
        "spread": spread.mean(),
        "noise": (0.5 * latent_logvar).exp().mean(),
    }
