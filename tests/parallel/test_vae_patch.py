"""Large pictures whose tiles several ranks compute: to the bit what one rank makes, and what diffusers makes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.model.vae import Vae
from bagel.model.weights import load_model
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.parallel.mesh import Mesh
from tests.parallel.ranks import Ranks
from tests.shared import MODEL

Made = list[tuple[Any, np.ndarray]]
TILE = 64
"""Pixels a side, of tiles small enough for a quick test."""
SIZES = ((48, 64), (64, 80), (128, 128), (176, 144), (80, 320))
"""Height and width of a picture of one tile, of two, and of many, the last ones smaller than what neighbours share."""


@cache
def vae() -> Vae:
    model = load_model(Checkpoint(MODEL), Role.FULL, delimiter_ids=(0, 1))
    vae = model.autoencoder()
    vae.autoencoder.tile_sample_min_size, vae.autoencoder.tile_latent_min_size = TILE, TILE // 8
    return vae


def latent(height: int, width: int) -> Tensor:
    return 3 * torch.randn(1, vae().config.z_channels, height // 8, width // 8, generator=torch.manual_seed(0))


def pixels(height: int, width: int) -> Tensor:
    return 2 * torch.rand(1, 3, height, width, generator=torch.manual_seed(0)) - 1


@torch.inference_mode()
def decode_and_encode(groups: Groups) -> Made:
    """Of each size the picture, None where this rank is not to have it, and the moments."""
    vae().use_tiling(groups.vae_decode, groups.vae_encode)
    made = []
    for size in SIZES:
        decoded = None
        if groups.vae_decode.index == 0:
            decoded = vae().decode(latent(*size)).numpy()
        else:
            vae().help_decode(latent(*size))
        made.append((decoded, torch.cat(vae().encode(pixels(*size)), dim=1).numpy()))
    return made


@torch.inference_mode()
def test_one_rank_blends_as_diffusers_does() -> None:
    config, network = vae().config, vae().autoencoder
    network.enable_tiling()
    for size, (decoded, moments) in zip(SIZES, decode_and_encode(UNDIVIDED), strict=True):
        z = latent(*size) / config.scale_factor + config.shift_factor
        assert np.array_equal(decoded, network.decode(z).sample.numpy()), size
        assert np.array_equal(moments, network.encode(pixels(*size)).latent_dist.parameters.numpy()), size


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> Made:
    """What one rank makes, with as many threads: a sum's order depends on them."""
    made: Made = ranks.run(Mesh(), decode_and_encode)[0]
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("world", "dividing"), [(2, 2), (3, 2), (4, 4)])
def test_ranks_make_what_one_rank_makes(world: int, dividing: int, ranks: Ranks, alone: Made) -> None:
    """The picture at the first rank, the moments on all, those that divide no tiles too."""
    for rank, made in enumerate(ranks.run(Mesh(data=world), decode_and_encode, vae_ranks=dividing)):
        for (decoded, moments), (picture, wanted) in zip(made, alone, strict=True):
            assert (decoded is not None) is (rank == 0 or rank >= dividing)
            assert decoded is None or np.array_equal(decoded, picture)
            assert np.array_equal(moments, wanted)
