"""Large products in parts: which products are worth it, and that they give what one product gives."""

from __future__ import annotations

import pytest
import torch

from bagel.model.linear import Linear, Split
from bagel.model.products import WholeWaves, whole_product
from bagel.parallel.mesh import Share

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
H200 = 132


def linear(outputs: int, inputs: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Linear:
    """A layer without a bias, of random weights."""
    layer = Linear({"layer": Share.all(outputs)}, Share.all(inputs), Split.ROW, bias=False, dtype=dtype).to(device)
    torch.nn.init.normal_(layer.weight, std=inputs**-0.5, generator=torch.Generator(device).manual_seed(1))
    return layer


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [
        (1024, None),  # less than a wave
        (4096, (4096, 2048)),  # 3.4 waves, of whose first two 8 x 32 tiles leave 8 multiprocessors idle
        (8192, None),  # a last wave that is nearly full
        (12288, (10752, 3584)),  # 10.2 waves
    ],
)
def test_a_short_last_wave_is_computed_apart(tokens: int, cut: tuple[int, int] | None) -> None:
    assert WholeWaves(H200).cut(tokens, 3584) == cut


@pytest.mark.parametrize("tokens", [896, 1536])
def test_parts_give_what_one_product_gives(tokens: int) -> None:
    layer, x = linear(1792, 64), torch.randn(tokens, 64)
    in_parts = WholeWaves(multiprocessors=16)
    assert in_parts.cut(tokens, 1792) is not None
    with torch.inference_mode():
        torch.testing.assert_close(in_parts(layer, x), whole_product(layer, x))


@gpu
@pytest.mark.parametrize("tokens", [4096, 12288])
@pytest.mark.parametrize("inputs", [3584, 18944])
def test_on_a_gpu_parts_give_the_same_bits(tokens: int, inputs: int) -> None:
    layer = linear(3584, inputs, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(WholeWaves(H200)(layer, x), whole_product(layer, x))
