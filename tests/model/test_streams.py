"""The two experts' halves of a layer: neither needs the other, and on two streams they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.layout import latent_rows
from bagel.model.attention import KvSlab
from bagel.model.backend import choose_backend
from bagel.model.bagel import Bagel
from bagel.model.streams import RunBoth, SideBySide, one_by_one
from bagel.model.weights import load_model, random_model

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BUCKET = 24


def forward(model: Bagel, run_both: RunBoth) -> tuple[Tensor, ...]:
    """Hidden states of two rows of latents with their delimiters, and the K/V that they leave."""
    decoder, device = model.language_model, model.device
    decoder.backend = replace(decoder.backend, run_both=run_both)
    slab = KvSlab(model.kv_shape, 400, dtype=model.dtype, device=device)
    generator = torch.Generator().manual_seed(3)
    hidden = model.config.llm.hidden_size
    und, gen = (torch.randn(2, n, hidden, generator=generator).to(device) for n in (2, BUCKET))
    with torch.inference_mode():
        rows = latent_rows(decoder, [0, 200], [0, 0], [0, 4], [20, 17], BUCKET)
        found = decoder(und, gen, rows, slab)
    return *found, slab.k, slab.v


def large_first(small: Callable[[], Any], large: Callable[[], Any]) -> tuple[Any, Any]:
    second = large()
    return small(), second


def test_neither_half_needs_what_the_other_computes(checkpoint: Checkpoint) -> None:
    model, calls = load_model(checkpoint, Role.FULL, delimiter_ids=(1, 2)), 0

    def counted(small: Callable[[], Any], large: Callable[[], Any]) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        return large_first(small, large)

    for ours, wanted in zip(forward(model, counted), forward(model, one_by_one), strict=True):
        assert torch.equal(ours, wanted)
    assert calls == 2 * model.config.llm.num_hidden_layers


def test_eager_and_cpu_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr("bagel.model.backend.SideBySide", made.append)
    monkeypatch.setattr("bagel.model.backend.choose_attention", lambda *_: "fa2")
    assert choose_backend(torch.device("cpu"), torch.float32).run_both is one_by_one
    backend = choose_backend(torch.device("cuda"), torch.bfloat16, eager=True)
    assert (backend.run_both, backend.kernels.name, backend.captures) == (one_by_one, "torch", False)
    assert not made


@pytest.fixture(scope="module")
def model_on_gpu() -> Bagel:
    """Three layers as wide as the 7B's."""
    config = replace(BAGEL_7B_MOT, llm=replace(BAGEL_7B_MOT.llm, num_hidden_layers=3))
    return random_model(config, Role.DENOISE, dtype=torch.bfloat16, device="cuda", seed=0)


@pytest.mark.gpu
@gpu
def test_two_streams_compute_the_same(model_on_gpu: Bagel) -> None:
    wanted = forward(model_on_gpu, one_by_one)
    beside = SideBySide(model_on_gpu.device)
    for _ in range(20):  # memory that was freed too early would be overwritten sooner or later
        for ours, each in zip(forward(model_on_gpu, beside), wanted, strict=True):
            assert torch.equal(ours, each)


@pytest.mark.gpu
@gpu
def test_the_caller_waits_for_the_small_one_even_after_an_error() -> None:
    device = torch.device("cuda")
    beside, slow = SideBySide(device), torch.zeros(1, device=device)

    def small() -> None:
        torch.cuda._sleep(200_000_000)
        slow.fill_(1)

    def large() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        beside(small, large)
    assert slow.clone().item() == 1
