"""The first stage: the autoencoder, to flat colours and clean edges, with latents of about unit variance."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.model.bagel import Bagel
from bagel.model.config import VaeConfig
from training.nano.batches import CODE
from training.nano.journal import Journal, Schedule
from training.nano.render import Renderer
from training.nano.world import MAX_OBJECTS

KL, MOMENTS, EDGES = 2e-4, 0.05, 0.5
RATE = 1.2e-3


def train_vae(model: Bagel, stream: Any, schedule: Schedule, journal: Journal, *, device: torch.device) -> None:
    """Train model.vae until the schedule is over."""
    assert model.vae is not None
    autoencoder, config = model.vae.autoencoder, model.vae.config
    autoencoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    renderer, step, said = Renderer(device), 0, 0.0
    while not schedule.over:
        pixels = _pictures(renderer, next(stream), device)
        for entry in optimizer.param_groups:
            entry["lr"] = RATE * schedule.scale(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, parts = vae_loss(autoencoder, config, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        if bool(norm.isfinite()):
            optimizer.step()
        if step == 0:
            schedule.begin()
        step += 1
        if schedule.progress - said > 0.04 or schedule.over:
            said = schedule.progress
            journal.write(step=step, **{name: float(value) for name, value in parts.items()}, norm=float(norm))


def vae_loss(autoencoder: Any, config: VaeConfig, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute error of pixels and of their differences, KL to the unit latent, and each channel's mean and spread."""
    mean, logvar = autoencoder.encoder(pixels).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 6)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    decoded = autoencoder.decoder(z).float()
    error = decoded - pixels
    pixel = error.abs().mean() + error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    latent_mean = config.scale_factor * (mean - config.shift_factor)
    latent_logvar = logvar + 2 * torch.tensor(config.scale_factor).log().item()
    kl = 0.5 * (latent_mean.square() + latent_logvar.exp() - 1 - latent_logvar).mean()
    latent = config.scale_factor * (z - config.shift_factor)
    spread, centre = latent.std(dim=(0, 2, 3)), latent.mean(dim=(0, 2, 3))
    moments = (centre.square() + (spread - 1).square()).mean()
    loss = pixel + EDGES * edges + KL * kl + MOMENTS * moments
    worst = F.relu(error.abs() - 0.1).gt(0).float().mean()
    return loss, {
        "l1": error.abs().mean().detach(),
        "edges": edges.detach(),
        "far": worst.detach(),
        "kl": kl.detach(),
        "spread": spread.mean().detach(),
        "noise": (0.5 * latent_logvar).exp().mean().detach(),
    }


def _pictures(renderer: Renderer, packed: dict[str, Tensor], device: torch.device) -> Tensor:
    """Scenes of the tasks, a fifth of them in any colours."""
    codes = torch.cat([each[:, -CODE:] for each in packed.values()]).to(device, non_blocking=True)
    free = len(codes) // 5
    colours = torch.rand(free, 1 + MAX_OBJECTS, 3, device=device) * 2 - 1
    pixels = torch.cat((renderer(codes[:free], colours), renderer(codes[free:])))
    return pixels.contiguous(memory_format=torch.channels_last)
