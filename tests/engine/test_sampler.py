"""Drawing: branches, buckets and batches change the work, never the picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bagel.checkpoint.limits import latent_bucket, padded_latents
from bagel.engine.context import Context, ContextBuilder
from bagel.engine.local import BagelEngine
from bagel.engine.memory import kv_space_of
from bagel.engine.noise import initial_noise
from bagel.engine.picture import Picture
from bagel.engine.sampler import Canvas
from bagel.engine.segments import Chain
from bagel.guidance import needed_branches
from bagel.model.bagel import Bagel
from bagel.parity.record import Recorder
from bagel.prompts import BranchName
from bagel.request import ImageSettings

SETTINGS = ImageSettings(steps=5, cfg_img_scale=1.5, cfg_interval=(0.4, 1.0))


def contexts(engine: BagelEngine, *, img: str = "a cup") -> dict[BranchName, Context]:
    texts = {BranchName.GEN: "a red cup", BranchName.CFG_IMG: img}
    builder = ContextBuilder(engine.model)
    built = {name: builder.build(engine.planner.append_text(Chain(), text)) for name, text in texts.items()}
    return {**built, BranchName.CFG_TEXT: Context()}


def picture(
    engine: BagelEngine, grid: tuple[int, int], seed: int, settings: ImageSettings = SETTINGS, *, img: str = "a cup"
) -> Picture:
    noise = initial_noise(seed, grid[0] * grid[1], engine.model.config.latent_features)
    return Picture(settings, grid, noise, contexts(engine, img=img))


def canvas_of(model: Bagel, pictures: list[Picture], padded: int) -> Canvas:
    """A canvas with these pictures on it, and room for no more."""
    canvas = Canvas(model, padded, kv_space_of(model, [each for one in pictures for each in one.kv_tokens(padded)]))
    for one in pictures:
        canvas.add(one)
    return canvas


def draw(engine: BagelEngine, pictures: list[Picture], padded: int) -> list[torch.Tensor]:
    canvas = canvas_of(engine.model, pictures, padded)
    while active := [drawing for drawing in canvas.drawings if not drawing.finished]:
        canvas.step(active)
    return [drawing.latents for drawing in canvas.drawings]


def test_padding_to_a_bucket_changes_nothing(engine: BagelEngine) -> None:
    (exact,) = draw(engine, [picture(engine, (5, 7), 1)], 35)
    (padded,) = draw(engine, [picture(engine, (5, 7), 1)], 64)
    torch.testing.assert_close(padded, exact, atol=2e-5, rtol=0)


def test_pictures_of_several_sizes_and_lengths_share_a_batch(engine: BagelEngine) -> None:
    grids, long = [(5, 7), (4, 4), (6, 4)], replace(SETTINGS, steps=7)
    alone = [draw(engine, [picture(engine, grid, i, long if i else SETTINGS)], 40)[0] for i, grid in enumerate(grids)]
    pictures = [picture(engine, grid, i, long if i else SETTINGS) for i, grid in enumerate(grids)]
    together = draw(engine, pictures, 40)
    for ours, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=0)


def rows_per_step(engine: BagelEngine, one: Picture) -> list[int]:
    canvas, rows = canvas_of(engine.model, [one], one.tokens), []
    while not canvas.drawings[0].finished:
        with Recorder(engine.model) as record:
            canvas.step(canvas.drawings)
        rows.append(record.last("decoder.in")[1].shape[0])
    return rows


def test_only_the_branches_that_guide_a_step_are_run(engine: BagelEngine) -> None:
    one = picture(engine, (4, 4), 1)
    assert rows_per_step(engine, one) == [3, 3, 3, 3]
    late = picture(engine, (4, 4), 1, replace(SETTINGS, cfg_interval=(0.8, 1.0)))
    assert rows_per_step(engine, late) == [3, 3, 1, 1]
    assert rows_per_step(engine, picture(engine, (4, 4), 1, replace(SETTINGS, cfg_text_scale=1.0))) == [1] * 4
    assert rows_per_step(engine, picture(engine, (4, 4), 1, replace(SETTINGS, cfg_img_scale=1.0))) == [2] * 4


def test_equal_branches_are_denoised_once(engine: BagelEngine) -> None:
    one = picture(engine, (4, 4), 1, img="a red cup")
    assert rows_per_step(engine, one) == [2, 2, 2, 2]


def test_needed_branches_leave_out_what_no_step_uses() -> None:
    never = replace(SETTINGS, cfg_interval=(0.0, 0.1))
    assert needed_branches(never) == {BranchName.GEN}
    assert needed_branches(replace(SETTINGS, cfg_text_scale=1.0)) == {BranchName.GEN}
    assert needed_branches(SETTINGS) == set(BranchName)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 16), (16, 16), (17, 32), (64, 64), (1024, 1024), (1088, 1152), (4096, 4096)]
)
def test_buckets_are_few_and_at_most_an_eighth_too_large(tokens: int, bucket: int) -> None:
    assert latent_bucket(tokens) == bucket
    sizes = {latent_bucket(n) for n in range(1, 4097)}
    assert len(sizes) < 64
    assert all(n <= latent_bucket(n) <= max(n * 9 / 8 + 1, n + 15) for n in range(1, 4097))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_that_divide_latents_get_equally_many(ranks: int) -> None:
    for device in ("cpu", "cuda:0"):
        padded = [padded_latents(tokens, device, ranks) for tokens in range(1, 4097)]
        assert all(each % ranks == 0 for each in padded)
        assert all(0 <= each - padded_latents(n, device) < ranks for n, each in enumerate(padded, 1))


def test_a_step_writes_only_the_latents_rows(engine: BagelEngine) -> None:
    one = picture(engine, (4, 4), 1)
    canvas = canvas_of(engine.model, [one], 16)
    with Recorder(engine.model) as record:
        canvas.step(canvas.drawings)
        slab = record.last("decoder.in")[3]
        before = slab.k.clone()
        canvas.step(canvas.drawings)
    changed = (slab.k != before).any(dim=-1).any(dim=-1).any(dim=0)
    length = one.contexts[BranchName.GEN].length
    assert not changed[:length].any()
    assert changed[length : length + 18].all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_never_waits_inside_a_step() -> None:
    from bagel.checkpoint.config import BAGEL_7B_MOT
    from bagel.checkpoint.roles import Role
    from bagel.model.weights import random_model

    config = replace(BAGEL_7B_MOT, llm=replace(BAGEL_7B_MOT.llm, num_hidden_layers=2))
    model = random_model(config, Role.DENOISE, dtype=torch.bfloat16, device="cuda", seed=0)
    same = dict.fromkeys(BranchName, Context())
    one = Picture(replace(SETTINGS, cfg_img_scale=1.0), (8, 8), torch.randn(64, 64), same)
    canvas = canvas_of(model, [one], 64)
    canvas.step(canvas.drawings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        canvas.step(canvas.drawings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
