"""The FLUX autoencoder: pixels to latents and back, always in float32; large pictures in tiles if asked to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from bagel.model.autoencoder import Autoencoder
from bagel.model.config import VaeConfig

TILE_SIZE = 512
"""Pixels a side of a tile, where tiling is on; a picture up to that size is decoded whole."""
TILE_OVERLAP = 4
"""Neighbouring tiles share one part in so many."""


class Vae(nn.Module):
    """Pixels to latents and back; holds the encoder, the decoder or both.

    Latents are the model's: scale * (z - shift).
    """

    # Weights and inputs keep PyTorch's default layout (channels first). With channels last a CPU convolves a little
    # faster, but its group norm then adds each group up in float32 one value after the other: the error grows with
    # the picture, to 1e-4 at 512 x 512 (bench/README.md).

    def __init__(self, config: VaeConfig, *, encoder: bool, decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(config, encoder=encoder, decoder=decoder)
        self._tiling = False

    def use_tiling(self) -> None:
        """Decode pictures above TILE_SIZE in overlapping, blended tiles: less memory, not exactly the same picture."""
        self._tiling = True

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [1, 3, H, W] in [-1, 1] -> posterior mean and log variance, each [1, z, H/8, W/8]."""
        assert self.autoencoder.encoder is not None
        with exact_convolutions():
            moments = self.autoencoder.encoder(pixels.contiguous())
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Latent of a posterior sample: scale * (mean + exp(logvar / 2) * noise - shift)."""
        z = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """latent [1, z, h, w] -> pixels [1, 3, 8 h, 8 w], about [-1, 1], not clamped."""
        assert self.autoencoder.decoder is not None
        z = (latent / self.config.scale_factor + self.config.shift_factor).contiguous()
        with exact_convolutions():
            tile = TILE_SIZE // self.config.downsample
            if self._tiling and max(z.shape[2:]) > tile:
                return in_tiles(self.autoencoder.decoder, z, tile, self.config.downsample)
            decoded: Tensor = self.autoencoder.decoder(z)
        return decoded


def in_tiles(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int, scale: int) -> Tensor:
    """z [B, z, h, w] -> pixels [B, 3, scale h, scale w], decoded tile by tile; neighbours fade into each other."""
    step, fade = tile - tile // TILE_OVERLAP, scale * tile // TILE_OVERLAP
    kept = scale * tile - fade
    height, width = z.shape[2:]
    rows = [
        [decode(z[:, :, top : top + tile, left : left + tile]) for left in range(0, width, step)]
        for top in range(0, height, step)
    ]
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            if i > 0:
                fade_in(pixels, rows[i - 1][j], fade, dim=2)
            if j > 0:
                fade_in(pixels, row[j - 1], fade, dim=3)
    return torch.cat([torch.cat([each[:, :, :kept, :kept] for each in row], dim=3) for row in rows], dim=2)


def fade_in(pixels: Tensor, before: Tensor, fade: int, dim: int) -> None:
    """Let pixels begin as before ends, along dim: in place, over `fade` pixels or as many as there are."""
    fade = min(fade, before.shape[dim], pixels.shape[dim])
    share = torch.arange(fade, device=pixels.device, dtype=torch.float64) / fade
    share = share.view(-1, *([1] * (3 - dim)))
    begin = pixels.narrow(dim, 0, fade)
    end = before.narrow(dim, before.shape[dim] - fade, fade)
    begin.copy_(end * (1 - share).to(pixels.dtype) + begin * share.to(pixels.dtype))


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions in full float32: PyTorch lets cuDNN round their inputs to TF32 unless told otherwise."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags
