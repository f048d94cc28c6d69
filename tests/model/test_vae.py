"""The autoencoder in float32 beside itself in float64, on pictures large enough for a sum's order to show."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from bagel.engine.local import BagelEngine
from bagel.model.vae import Vae

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

BOUND = 1e-5
"""A tenth of what a recording allows. Group norms over channels that lie last are off by 2e-5 and more at this size."""
SIDE = 320


@pytest.fixture(scope="module")
def vae(engine: BagelEngine) -> Vae:
    return engine.model.autoencoder()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ]
)
def placed(vae: Vae, request: pytest.FixtureRequest) -> Vae:
    """On the device, where a GPU computes with fused kernels."""
    ours = deepcopy(vae).to(request.param)
    if request.param == "cuda":
        ours.fuse()
    return ours


@torch.inference_mode()
def test_a_large_picture_is_decoded_exactly(vae: Vae, placed: Vae) -> None:
    exact = deepcopy(vae).double()
    latent = 3 * torch.randn(1, vae.config.z_channels, SIDE // 8, SIDE // 8, generator=torch.manual_seed(0))
    latent = latent.contiguous(memory_format=torch.channels_last)
    device = next(placed.parameters()).device
    error = placed.decode(latent.to(device)).double().cpu() - exact.decode(latent.double())
    assert error.abs().max() < BOUND


@torch.inference_mode()
def test_a_large_picture_is_encoded_exactly(vae: Vae, placed: Vae) -> None:
    exact = deepcopy(vae).double()
    pixels = 2 * torch.rand(1, SIDE, SIDE, 3, generator=torch.manual_seed(0)).permute(0, 3, 1, 2) - 1
    device = next(placed.parameters()).device
    for ours, theirs in zip(placed.encode(pixels.to(device)), exact.encode(pixels.double()), strict=True):
        assert (ours.double().cpu() - theirs).abs().max() < BOUND


def test_the_autoencoder_is_float32_whatever_the_default_type_is(engine: BagelEngine) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        vae = Vae(engine.model.config.vae, encoder=True, decoder=True)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
