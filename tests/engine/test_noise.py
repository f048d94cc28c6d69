"""Random draws: the reference's where it has them, and what a seed changes and what it does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagel.engine.noise import Posterior, Shape, initial_noise, text_uniforms
from bagel.request import MAX_SEED, PosteriorMode

SMALL, LARGE = (1, 16, 10, 14), (1, 16, 64, 64)
RED, BLUE = bytes(range(16)), bytes(range(16, 32))


@pytest.fixture(autouse=True)
def _own_global_generator() -> Iterator[None]:
    """Tests here seed torch's global generator, as the reference does; nobody else's draws change by it."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("seed", [0, 7, 2**31, MAX_SEED])
@pytest.mark.parametrize("tokens", [1, 16, 35, 4096])
def test_initial_noise_is_the_references(seed: int, tokens: int) -> None:
    noise = initial_noise(seed, tokens, 64)
    torch.manual_seed(seed)
    assert torch.equal(noise, torch.randn(tokens, 64))
    assert noise.dtype is torch.float32 and noise.device.type == "cpu"


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    initial_noise(3, 16, 64, [SMALL])
    text_uniforms(3, 10)
    for mode in PosteriorMode:
        Posterior(mode, 3).draw(SMALL, RED)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_in_mode_seed_posteriors_come_first_and_in_the_images_order() -> None:
    first = Posterior(PosteriorMode.SEED, 11).draw(SMALL, RED)
    second = Posterior(PosteriorMode.SEED, 11, (SMALL,)).draw(LARGE, BLUE)
    noise = initial_noise(11, 35, 64, [SMALL, LARGE])
    torch.manual_seed(11)
    assert torch.equal(first, torch.randn(SMALL))
    assert torch.equal(second, torch.randn(LARGE))
    assert torch.equal(noise, torch.randn(35, 64))


def test_in_mode_content_pixels_alone_decide() -> None:
    noise = Posterior(PosteriorMode.CONTENT, 1).draw(SMALL, RED)
    assert noise.shape == SMALL and noise.dtype is torch.float32
    assert torch.equal(noise, Posterior(PosteriorMode.CONTENT, 2, (LARGE, SMALL)).draw(SMALL, RED))
    assert not torch.equal(noise, Posterior(PosteriorMode.CONTENT, 1).draw(SMALL, BLUE))
    # A true sample, not a constant.
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_in_mode_mean_there_is_none() -> None:
    noise = Posterior(PosteriorMode.MEAN, 1).draw(SMALL, RED)
    assert noise.dtype is torch.float32 and torch.equal(noise, torch.zeros(SMALL))


SHAPES = st.lists(st.tuples(st.just(1), st.just(16), st.integers(1, 4), st.integers(1, 4)), max_size=3).map(tuple)
POSTERIORS = st.builds(Posterior, st.sampled_from(PosteriorMode), st.integers(0, 1), SHAPES)


@given(one=POSTERIORS, other=POSTERIORS)
def test_what_is_named_alike_is_drawn_alike(one: Posterior, other: Posterior) -> None:
    """K/V are shared by name, so two noises of one name must be one noise. (One noise may have two names.)"""
    shape: Shape = (1, 16, 2, 2)
    same = torch.equal(one.draw(shape, RED), other.draw(shape, RED))
    assert same or one.identity != other.identity


@pytest.mark.parametrize("seed", [0, 5, MAX_SEED])
def test_numbers_for_sampling_text(seed: int) -> None:
    numbers = text_uniforms(seed, 1000)
    assert torch.equal(numbers, text_uniforms(seed, 1000))
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    assert abs(numbers.mean() - 0.5) < 0.05
    assert not torch.equal(numbers, text_uniforms(seed ^ 1, 1000))


def test_a_longer_limit_does_not_change_the_text_before_it() -> None:
    assert torch.equal(text_uniforms(5, 1000)[:13], text_uniforms(5, 13))


@pytest.mark.parametrize("seed", [0, 5])
def test_text_and_noise_share_no_generator(seed: int) -> None:
    torch.manual_seed(seed)
    assert not torch.equal(text_uniforms(seed, 64), torch.rand(64))
