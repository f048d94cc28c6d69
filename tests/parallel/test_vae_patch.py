"""Large pictures whose tiles several ranks compute: to the bit what one rank makes, and what diffusers makes."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.progress import Heartbeat
from bagel.engine.vae_worker import EarlyPicture, FinishedPicture, VaeWorker
from bagel.model.bagel import Bagel
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
def model() -> Bagel:
    model = load_model(Checkpoint(MODEL), Role.FULL, delimiter_ids=(0, 1))
    network = model.autoencoder().autoencoder
    network.tile_sample_min_size, network.tile_latent_min_size = TILE, TILE // 8
    return model


def vae() -> Vae:
    return model().autoencoder()


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


def work_of_a_vae_thread(groups: Groups) -> list[tuple[str, np.ndarray]]:
    """Pictures that are given out: of two previews, each of which one rank takes for cancelled, and a picture."""
    model().groups = groups
    vae().use_tiling(groups.vae_decode, groups.vae_encode)
    given: list[tuple[str, np.ndarray]] = []

    def emit(event: Any) -> None:
        given.append((f"{type(event).__name__} {event.id}", np.asarray(event.picture)))

    worker = VaeWorker(
        model(),
        Heartbeat(),
        emit=emit,
        fail=lambda id_, error: given.append((f"{id_}: {error}", np.empty(0))),
        is_drawing=lambda id_: (id_ == 1) is (groups.world.index == 0),
    )
    grid = (TILE // 16, 5 * TILE // 16)
    drawing: Any = SimpleNamespace(finished=False, picture=SimpleNamespace(grid=grid))
    for id_ in (1, 2):
        worker.preview(EarlyPicture(id_, 0, 1, latents(id_, grid), drawing, None, None))
    worker.finish(FinishedPicture(3, latents(3, grid), grid, None, None, None))
    worker.close()
    return given


def latents(seed: int, grid: tuple[int, int]) -> Tensor:
    shape = (grid[0] * grid[1], model().config.latent_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.slow
def test_the_first_rank_decides_whether_a_preview_is_still_wanted(ranks: Ranks) -> None:
    """When a request leaves, ranks may be at different places; their tiles must be of one picture all the same."""
    (wanted,) = ranks.run(Mesh(), work_of_a_vae_thread)
    first, second = ranks.run(Mesh(data=2), work_of_a_vae_thread, vae_ranks=2)
    assert second == []
    assert [name for name, _ in first] == [name for name, _ in wanted] == ["Previewed 1", "Drawn 3"]
    assert all(np.array_equal(ours, one) for (_, ours), (_, one) in zip(first, wanted, strict=True))
