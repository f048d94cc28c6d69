"""Turn batches of pictures into the model's inputs: ViT patches, latents and latent tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bagel.checkpoint.config import VaeConfig
from bagel.model.vae import Vae
from training.nano.network import PATCH, VIT_SIDE
from training.nano.world import SIDE


class VitInput:
    """Pixels [b, 3, SIDE, SIDE] -> ViT patches [b, n, features], with Pillow's bicubic resize as a matrix."""

    def __init__(self, device: torch.device | str) -> None:
        eye = torch.eye(SIDE)[None, None]
        resized = F.interpolate(eye, (VIT_SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        self.matrix = resized[0, 0].to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        small = _rounded(torch.einsum("bchw,jw->bchj", pixels, self.matrix))  # Pillow rounds after each direction
        small = _rounded(torch.einsum("ih,bchj->bcij", self.matrix, small))
        grid = small.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        return torch.einsum("bchpwq->bhwpqc", grid).flatten(3).flatten(1, 2)


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.add(1).mul(127.5).round().clamp(0, 255) / 127.5 - 1


def patchify(latents: Tensor, patch: int = 2) -> Tensor:
    """latents [b, c, h, w] -> tokens [b, n, patch * patch * c]: a batched bagel.model.flow.latent_patchify."""
    grid = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return torch.einsum("bchpwq->bhwpqc", grid).flatten(3).flatten(1, 2)


def latent_tokens(mean: Tensor, logvar: Tensor, config: VaeConfig, noise: Tensor | None) -> Tensor:
    """Posterior moments [b, z, h, w] -> latent tokens of a sample, or of the mean if there is no noise."""
    z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
    return patchify(config.scale_factor * (z - config.shift_factor))


def moments(encoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior mean and log variance of a batch."""
    mean, logvar = encoder(pixels).float().chunk(2, dim=1)
    return mean, logvar


def clean_latents(vae: Vae, pixels: Tensor) -> Tensor:
    """The latent tokens of a batch's posterior means."""
    return latent_tokens(*moments(vae.autoencoder.encoder, pixels), vae.config, None)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [b, 3, h, w] in [-1, 1] -> RGB images, rounded."""
    u8 = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(each)) for each in u8]
