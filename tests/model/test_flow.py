"""The mathematics of drawing: schedule, guidance and the token layout, against plain formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bagel.model.flow import guide, guided_steps, guiding_branches, latent_patchify, latent_unpatchify, timesteps
from bagel.prompts import BranchName
from bagel.request import ImageSettings, RenormType

GEN, CFG_TEXT, CFG_IMG = BranchName
Array = npt.NDArray[Any]
Velocities = tuple[Array, Array, Array]

TOKENS, FEATURES = 3, 4
VELOCITY = hnp.arrays(np.float32, (TOKENS, FEATURES), elements=st.floats(-4, 4, width=32), fill=st.nothing())
VELOCITIES = st.tuples(VELOCITY, VELOCITY, VELOCITY)
SETTINGS = st.builds(
    ImageSettings,
    cfg_text_scale=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(1, 8),
    cfg_img_scale=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(1, 4),
    cfg_renorm_type=st.sampled_from(RenormType),
    cfg_renorm_min=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
)


# Recorded from the reference: times of the steps; the last one ends at 0.
@pytest.mark.parametrize(
    ("steps", "shift", "times"),
    [
        (2, 3.0, [1.0]),
        (4, 3.0, [1.0, 0.8571428060531616, 0.5999999642372131]),
        (5, 1.0, [1.0, 0.75, 0.5, 0.25]),
        (5, 4.0, [1.0, 0.9230769276618958, 0.800000011920929, 0.5714285969734192]),
        (7, 3.0, [1.0, 0.9375000596046448, 0.8571428060531616, 0.75, 0.5999999642372131, 0.375]),
    ],
)
def test_schedule(steps: int, shift: float, times: list[float]) -> None:
    schedule = timesteps(steps, shift)
    assert schedule.dtype is torch.float32
    assert schedule.tolist() == pytest.approx([*times, 0.0], abs=1e-7)


def test_fifty_timesteps_are_forty_nine_steps() -> None:
    schedule = timesteps(50, 3.0)
    assert len(schedule) == 50 and schedule[0] == 1 and schedule[-1] == 0
    assert bool((schedule.diff() < 0).all())


@pytest.mark.parametrize(
    ("t", "interval", "on"),
    [
        ([1.0, 0.75, 0.5, 0.375, 0.25], (0.4, 1.0), [True, True, True, False, False]),
        ([1.0, 0.75, 0.5, 0.25], (0.25, 0.75), [False, True, True, False]),
        ([1.0, 0.01], (0.0, 1.0), [True, True]),
        ([1.0, 0.5], (0.5, 0.5), [False, False]),
        # The schedule's rounding counts: its second step of seven lies just above 15/16.
        ([0.93750006, 0.9375], (0.4, 0.9375), [False, True]),
        # So does the bounds': 0.6 is 0.60000002 in float32, on both sides.
        ([0.6], (0.6, 1.0), [False]),
        ([0.7], (0.4, 0.7), [True]),
    ],
)
def test_guidance_is_on_above_lo_up_to_hi_in_float32(t: list[float], interval: Any, on: list[bool]) -> None:
    assert guided_steps(torch.tensor(t, dtype=torch.float32), interval) == on


def guided(velocities: Velocities, settings: ImageSettings) -> Array:
    """The project's answer, given the branches that it asks for."""
    run = guiding_branches(settings) | {GEN}
    given = {name: torch.from_numpy(v) for name, v in zip(BranchName, velocities, strict=True) if name in run}
    velocity: Array = guide(given, settings).numpy()
    return velocity


def factor(p: Array, q: Array, smallest: float, axis: int | None) -> Array:
    """How much of q is kept for it to be no longer than p."""

    def norm(v: Array) -> Array:
        return np.asarray(np.sqrt((v**2).sum(axis=axis, keepdims=True)))

    return np.minimum(1, np.maximum(smallest, norm(p) / (norm(q) + 1e-8)))


def reference(velocities: Velocities, settings: ImageSettings) -> Array:
    """The reference's guidance, written down plainly in float64."""
    c, text, image = (v.astype(np.float64) for v in velocities)
    a, b, m = settings.cfg_text_scale, settings.cfg_img_scale, settings.cfg_renorm_min
    if a <= 1:
        return c
    g = text + a * (c - text)
    if settings.cfg_renorm_type == "text_channel":
        g = g * factor(c, g, m, -1)
        return image + b * (g - image) if b > 1 else g
    h = image + b * (g - image) if b > 1 else g
    return h * factor(c, h, m, None if settings.cfg_renorm_type == "global" else -1)


@given(velocities=VELOCITIES, settings=SETTINGS)
def test_guidance_is_the_references(velocities: Velocities, settings: ImageSettings) -> None:
    np.testing.assert_allclose(guided(velocities, settings), reference(velocities, settings), rtol=0, atol=1e-3)


@pytest.mark.parametrize("renorm", RenormType)
@pytest.mark.parametrize(("a", "b"), [(4.0, 2.0), (4.0, 1.0), (4.0, 0.5), (1.3, 2.0), (1.0, 2.0), (0.5, 2.0)])
def test_guidance_of_every_kind(renorm: RenormType, a: float, b: float) -> None:
    draw = np.random.default_rng(0).standard_normal
    c, text, image = (draw((TOKENS, FEATURES), dtype=np.float32) for _ in BranchName)
    text[0] = 1.1 * c[0]  # a token that guidance makes shorter: it stays so
    settings = ImageSettings(cfg_text_scale=a, cfg_img_scale=b, cfg_renorm_type=renorm)
    np.testing.assert_allclose(
        guided((c, text, image), settings), reference((c, text, image), settings), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("renorm", [RenormType.GLOBAL, RenormType.CHANNEL])
def test_without_an_image_the_image_scale_raises_the_texts(renorm: RenormType) -> None:
    """docs/options.md: a text scale of 4.0 with an image scale of 1.5 is one of 5.5."""
    draw = np.random.default_rng(0).standard_normal
    c, text = (draw((TOKENS, FEATURES), dtype=np.float32) for _ in range(2))
    both = ImageSettings(cfg_text_scale=4.0, cfg_img_scale=1.5, cfg_renorm_type=renorm)
    alone = ImageSettings(cfg_text_scale=5.5, cfg_img_scale=1.0, cfg_renorm_type=renorm)
    np.testing.assert_allclose(guided((c, text, c), both), guided((c, text, c), alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "branches"),
    [
        (4.0, 2.0, {CFG_TEXT, CFG_IMG}),
        (4.0, 1.0, {CFG_TEXT}),
        (1.0, 1.0, set()),
        # The reference computes the image branch here and throws it away.
        (1.0, 2.0, set()),
        (0.0, 2.0, set()),
    ],
)
def test_branches_that_change_nothing_are_not_run(a: float, b: float, branches: set[BranchName]) -> None:
    assert guiding_branches(ImageSettings(cfg_text_scale=a, cfg_img_scale=b)) == branches


def test_outside_the_interval_the_velocity_is_gens_own() -> None:
    c = torch.rand(TOKENS, FEATURES)
    assert torch.equal(guide({GEN: c}, ImageSettings(cfg_text_scale=4.0, cfg_img_scale=2.0)), c)


def lengths(v: Array, *, per_token: bool) -> Array:
    return np.asarray(np.linalg.norm(v, axis=-1 if per_token else None))


@given(velocities=VELOCITIES, settings=SETTINGS)
def test_renorm_bounds_the_length(velocities: Velocities, settings: ImageSettings) -> None:
    """Guidance lengthens no velocity, per token or as a whole; with the lower bound 1 nothing is scaled."""
    per_token = settings.cfg_renorm_type is not RenormType.GLOBAL
    # text_channel renorms before the image step, so there its bound holds without one.
    scale = 1.0 if settings.cfg_renorm_type is RenormType.TEXT_CHANNEL else settings.cfg_img_scale
    bounded = guided(velocities, replace(settings, cfg_img_scale=scale, cfg_renorm_min=0.0))
    limit = lengths(velocities[0], per_token=per_token)
    assert np.all(lengths(bounded, per_token=per_token) <= limit * (1 + 1e-4) + 1e-4)


def test_a_lower_bound_of_one_scales_nothing() -> None:
    c, text = torch.ones(TOKENS, FEATURES), torch.zeros(TOKENS, FEATURES)
    velocities: Mapping[BranchName, torch.Tensor] = {GEN: c, CFG_TEXT: text}
    for renorm in RenormType:
        settings = ImageSettings(cfg_text_scale=4.0, cfg_renorm_type=renorm, cfg_renorm_min=1.0)
        assert torch.equal(guide(velocities, settings), 4 * c)
        torch.testing.assert_close(guide(velocities, replace(settings, cfg_renorm_min=0.5)), 2 * c)
        torch.testing.assert_close(guide(velocities, replace(settings, cfg_renorm_min=0.0)), c)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), patch=st.integers(1, 3), channels=st.integers(1, 4))
def test_tokens_and_back(rows: int, columns: int, patch: int, channels: int) -> None:
    latent = torch.rand(channels, rows * patch, columns * patch)
    tokens = latent_patchify(latent, patch)
    assert tokens.shape == (rows * columns, patch * patch * channels)
    assert torch.equal(latent_unpatchify(tokens, rows, columns, patch), latent)


def test_tokens_are_row_major_and_their_features_row_column_channel() -> None:
    rows, columns, patch, channels = 2, 3, 2, 4
    latent = torch.arange(channels * rows * patch * columns * patch).view(channels, rows * patch, columns * patch)
    tokens = latent_patchify(latent, patch)
    for row, column, p, q, channel in np.ndindex(rows, columns, patch, patch, channels):
        token, feature = row * columns + column, (p * patch + q) * channels + channel
        assert tokens[token, feature] == latent[channel, row * patch + p, column * patch + q]
