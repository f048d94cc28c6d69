"""Picture steps as CUDA graphs: the same latents as of steps that are launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.roles import Role
from bagel.engine import step_graphs
from bagel.engine.context import Context
from bagel.engine.local import BagelEngine
from bagel.engine.memory import kv_space_of
from bagel.engine.picture import Picture
from bagel.engine.sampler import Canvas
from bagel.engine.step_graphs import StepGraphs
from bagel.model.attention import Rows
from bagel.model.attention_backends import sdpa
from bagel.model.bagel import Bagel
from bagel.model.weights import random_model
from bagel.parity.record import Recorder
from bagel.prompts import BranchName
from tests.engine.test_sampler import SETTINGS, picture

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Repeating:
    """In place of GraphMaker, where there is no GPU: a replay runs the forward on its static inputs again."""

    def __init__(self, device: torch.device) -> None:
        self.captured = 0

    def capture(self, forward: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        self.captured += 1
        result = forward()

        class Graph:
            @staticmethod
            def replay() -> None:
                result.copy_(forward())

        return Graph, result


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attention that takes the rows' places from the device."""
    places = list(zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True))
    return sdpa(q, k, v, replace(rows, intervals=places))


def capturing(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> Bagel:
    """The model as it is on a GPU, but for the graphs."""
    decoder = model.language_model
    monkeypatch.setattr(step_graphs, "GraphMaker", Repeating)
    monkeypatch.setattr(decoder, "backend", replace(decoder.backend, attend=attend, captures=True))
    return model


@pytest.fixture
def captured(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> Bagel:
    return capturing(engine.model, monkeypatch)


def drawn(model: Bagel, pictures: list[Picture], *, graphs: bool) -> tuple[list[Tensor], StepGraphs | None]:
    """The latents of pictures that join one after the other, two steps apart, and leave when they are finished."""
    space = kv_space_of(model, [each for one in pictures for each in one.kv_tokens(40)])
    made = StepGraphs.over(model, space.slab) if graphs else None
    canvas, waiting, latents = Canvas(model, 40, space, made), list(pictures), []
    turn = 0
    while waiting or canvas.drawings:
        if waiting and turn % 2 == 0:
            canvas.add(waiting.pop(0))
        turn += 1
        canvas.step(canvas.drawings)
        for drawing in [each for each in canvas.drawings if each.finished]:
            latents.append(drawing.latents)
            canvas.remove(drawing)
    return latents, made


def test_replayed_steps_draw_the_same_pictures(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [picture(engine, grid, seed) for seed, grid in enumerate([(5, 7), (4, 4), (6, 4)])]
    wanted, _ = drawn(engine.model, pictures, graphs=False)
    latents, graphs = drawn(capturing(engine.model, monkeypatch), pictures, graphs=True)
    for ours, each in zip(latents, wanted, strict=True):
        assert torch.equal(ours, each)
    assert graphs is not None
    shapes = set(graphs._graphs)
    assert {bucket for _, bucket, _ in shapes} == {40} and len(shapes) > 1
    assert graphs._maker.captured == len(shapes)  # type: ignore[attr-defined]


def test_velocities_stay_when_the_next_are_computed(engine: BagelEngine, captured: Bagel) -> None:
    one = picture(engine, (4, 4), 1)
    space = kv_space_of(captured, one.kv_tokens(16))
    canvas = Canvas(captured, 16, space, StepGraphs.over(captured, space.slab))
    drawing = canvas.add(one)
    gen = {drawing: frozenset({BranchName.GEN})}
    first = canvas.velocities(gen)[drawing][BranchName.GEN]
    kept = first.clone()
    with torch.inference_mode():
        drawing.x.neg_()
    assert not torch.equal(canvas.velocities(gen)[drawing][BranchName.GEN], kept)
    assert torch.equal(first, kept)


def test_large_steps_and_steps_that_hooks_watch_are_not_replayed(engine: BagelEngine, captured: Bagel) -> None:
    space = kv_space_of(captured, [100])
    graphs = StepGraphs.over(captured, space.slab)
    assert graphs is not None
    assert graphs.take(2, 1024) and graphs.take(8, 256)
    assert not graphs.take(3, 1024) and not graphs.take(1, 4096)
    with Recorder(captured):
        assert not graphs.take(1, 16)
    assert graphs.take(1, 16)


def test_the_latest_graphs_are_kept(engine: BagelEngine, captured: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 2)
    one = always_guided(picture(engine, (4, 4), 1))
    space = kv_space_of(captured, one.kv_tokens(16))
    graphs = StepGraphs.over(captured, space.slab)
    assert graphs is not None
    canvas = Canvas(captured, 16, space, graphs)
    drawing = canvas.add(one)
    names = list(BranchName)
    for count in (1, 2, 1, 3):
        canvas.velocities({drawing: frozenset(names[:count])})
    assert list(graphs._graphs) == [(1, 16, 1), (3, 16, 1)]


def always_guided(one: Picture) -> Picture:
    """The same picture with guidance in every step."""
    return Picture(replace(SETTINGS, cfg_interval=(0.0, 1.0)), one.grid, one.noise, one.contexts)


@pytest.fixture(scope="module")
def model_on_gpu() -> Bagel:
    """Two layers as wide as the 7B's."""
    config = replace(BAGEL_7B_MOT, llm=replace(BAGEL_7B_MOT.llm, num_hidden_layers=2))
    return random_model(config, Role.DENOISE, dtype=torch.bfloat16, device="cuda", seed=0)


def square(side: int, seed: int) -> Picture:
    generator = torch.Generator().manual_seed(seed)
    settings = replace(SETTINGS, cfg_img_scale=1.0, cfg_interval=(0.5, 1.0))
    noise = torch.randn(side * side, 64, generator=generator)
    return Picture(settings, (side, side), noise, dict.fromkeys(BranchName, Context()))


@pytest.mark.gpu
@gpu
def test_replayed_steps_draw_the_same_pictures_on_a_gpu(model_on_gpu: Bagel) -> None:
    assert model_on_gpu.language_model.backend.captures
    pictures = [square(6, seed) for seed in range(3)]
    wanted, _ = drawn(model_on_gpu, pictures, graphs=False)
    ours, graphs = drawn(model_on_gpu, pictures, graphs=True)
    assert graphs is not None and len(graphs._graphs) > 1
    for one, each in zip(ours, wanted, strict=True):
        assert (one - each).norm() < 5e-3 * each.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@gpu
def test_a_replayed_step_never_makes_the_host_wait(model_on_gpu: Bagel) -> None:
    one = square(8, 0)
    space = kv_space_of(model_on_gpu, one.kv_tokens(64))
    canvas = Canvas(model_on_gpu, 64, space, StepGraphs.over(model_on_gpu, space.slab))
    canvas.add(one)
    canvas.step(canvas.drawings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        canvas.step(canvas.drawings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
