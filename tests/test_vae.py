"""The autoencoder in float32 beside itself in float64, on pictures large enough for a sum's order to show."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from bagel.engine.engine import BagelEngine
from bagel.model.vae import TILE_SIZE, Vae, in_tiles

BOUND = 1e-5
"""A tenth of what a recording allows. Group norms over channels that lie last are off by 2e-5 and more at this size."""
SIDE = 320


@pytest.fixture(scope="module")
def vae(engine: BagelEngine) -> Vae:
    return engine.model.autoencoder()


@torch.inference_mode()
def test_a_large_picture_is_decoded_exactly(vae: Vae) -> None:
    exact = deepcopy(vae).double()
    latent = 3 * torch.randn(1, vae.config.z_channels, SIDE // 8, SIDE // 8, generator=torch.manual_seed(0))
    latent = latent.contiguous(memory_format=torch.channels_last)
    error = vae.decode(latent).double() - exact.decode(latent.double())
    assert error.abs().max() < BOUND


@torch.inference_mode()
def test_a_large_picture_is_encoded_exactly(vae: Vae) -> None:
    exact = deepcopy(vae).double()
    pixels = 2 * torch.rand(1, SIDE, SIDE, 3, generator=torch.manual_seed(0)).permute(0, 3, 1, 2) - 1
    for ours, theirs in zip(vae.encode(pixels), exact.encode(pixels.double()), strict=True):
        assert (ours.double() - theirs).abs().max() < BOUND


@pytest.mark.parametrize(("height", "width"), [(8, 9), (20, 33), (40, 7)])
def test_tiles_that_agree_make_the_whole_picture(height: int, width: int) -> None:
    """Where every tile is what lies there in the picture, fading one into the next changes nothing."""

    def doubled(z: torch.Tensor) -> torch.Tensor:
        return F.interpolate(z, scale_factor=2.0, mode="nearest")

    z = torch.randn(1, 3, height, width, generator=torch.manual_seed(1))
    assert (in_tiles(doubled, z, 8, 2) - doubled(z)).abs().max() < 1e-6


def test_neighbouring_tiles_fade_into_each_other() -> None:
    """Tiles that disagree: the first is all 0, the second all 1."""
    tiles = iter([torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 12), torch.full((1, 1, 16, 4), 1.0)])
    row = in_tiles(lambda z: next(tiles), torch.zeros(1, 1, 6, 14), 8, 2)[0, 0, 0]
    assert row.tolist() == [0.0] * 12 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 12


@torch.inference_mode()
def test_pictures_above_a_tile_alone_are_tiled(vae: Vae) -> None:
    tiled = deepcopy(vae)
    tiled.use_tiling()
    side = TILE_SIZE // 8
    latent = torch.randn(1, vae.config.z_channels, 2, side + 2, generator=torch.manual_seed(2))
    assert torch.equal(tiled.decode(latent[..., :side]), vae.decode(latent[..., :side]))
    assert tiled.decode(latent).shape == vae.decode(latent).shape
    assert not torch.equal(tiled.decode(latent), vae.decode(latent))
