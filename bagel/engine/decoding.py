"""Latents to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bagel.model.bagel import Bagel
from bagel.model.flow import latent_unpatchify


def decode_picture(model: Bagel, latents: Tensor, grid: tuple[int, int], *, quick: bool = False) -> Tensor:
    """Latent tokens [tokens, features] -> decoder output [3, H, W], not clamped.

    quick: in bfloat16 on a GPU, a fraction of the time; for previews.
    """
    with _decoding(quick=quick and latents.is_cuda):
        return model.autoencoder().decode(_latent(model, latents, grid))[0].float()


def help_decode_picture(model: Bagel, latents: Tensor, grid: tuple[int, int], *, quick: bool = False) -> None:
    """The part of a rank that divides the tiles of a picture with the one that decodes it."""
    with _decoding(quick=quick and latents.is_cuda):
        model.autoencoder().help_decode(_latent(model, latents, grid))


def _latent(model: Bagel, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latent tokens as the autoencoder takes them, [1, z, h, w]."""
    return latent_unpatchify(latents, *grid, model.config.latent_patch_size)[None]


@contextmanager
def _decoding(*, quick: bool) -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=quick):
        yield
