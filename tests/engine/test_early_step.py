"""A picture's first step while the last layers of its K/V are on their way: the same picture, sooner."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bagel.checkpoint.config import LlmConfig
from bagel.checkpoint.files import Checkpoint
from bagel.engine.commands import AddPicture, Advance, Begin, LandedPage, LoadPages, PlacedContext, Remove, StepPlan
from bagel.engine.early_step import EarlyStep, least_layers
from bagel.engine.events import Begun, Drawn, LayersLanded, Stepped
from bagel.images.output import OutputFormat
from bagel.model.mot import MoTLayer
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from tests.engine.driven import Driven, driven, failures

ROWS = {BranchName.GEN: 7, BranchName.CFG_TEXT: 4, BranchName.CFG_IMG: 2}
"""Tokens of the contexts."""
GRID = (26, 27)
"""Latents of a picture whose steps of three rows are not small."""
PAUSE_S = 0.05
SETTINGS = ImageSettings(steps=3, cfg_img_scale=1.5)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture
def llm(checkpoint: Checkpoint) -> LlmConfig:
    return checkpoint.config.llm


def memory(llm: LlmConfig) -> torch.Tensor:
    """K and V of all contexts' rows, layer by layer, as bytes."""
    sizes = llm.num_hidden_layers, 2, ROWS[BranchName.GEN], llm.num_key_value_heads, llm.head_dim
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).view(torch.uint8).flatten()


def layer(llm: LlmConfig, number: int) -> tuple[LandedPage, ...]:
    """The pages of one layer of all contexts, which begin alike: those of two branches are the same memory."""
    row = llm.num_key_value_heads * llm.head_dim * 4
    half = ROWS[BranchName.GEN] * row
    k = number * 2 * half
    shared = ROWS[BranchName.CFG_TEXT]
    rest = LandedPage(
        BranchName.GEN, number, shared, ROWS[BranchName.GEN] - shared, k + shared * row, k + half + shared * row
    )
    begins = {BranchName.GEN: shared, BranchName.CFG_TEXT: shared, BranchName.CFG_IMG: ROWS[BranchName.CFG_IMG]}
    return rest, *(LandedPage(branch, number, 0, rows, k, k + half) for branch, rows in begins.items())


def picture(id_: int, grid: tuple[int, int] = GRID) -> AddPicture:
    contexts = {branch: PlacedContext(branch.encode(), rows, 3) for branch, rows in ROWS.items()}
    return AddPicture(id_, SETTINGS, grid, 5 + id_, (), contexts, OutputFormat("PNG"))


@contextmanager
def computed(engine: Driven, pause_s: float = 0.0) -> Iterator[list[int]]:
    """The numbers of the decoder's layers as they are computed, each of which takes so long at least."""
    numbers: list[int] = []

    def note(number: int) -> None:
        numbers.append(number)
        time.sleep(pause_s)

    layers = [each for each in engine.engine.loaded.model.modules() if isinstance(each, MoTLayer)]
    handles = [each.register_forward_hook(lambda *_, i=i: note(i)) for i, each in enumerate(layers)]
    try:
        yield numbers
    finally:
        for handle in handles:
            handle.remove()


def land(engine: Driven, llm: LlmConfig, id_: int, layers: Sequence[int]) -> None:
    """Let layers land one after the other, and carry out what the engine asks for meanwhile."""
    for number in layers:
        engine.send(LoadPages(id_, layer(llm, number)))
        if least_layers(llm.num_hidden_layers) <= number + 1 < llm.num_hidden_layers:
            engine.until(LayersLanded)
            engine.send(Advance(id_))


def pixels(engine: Driven, ids: Sequence[int]) -> dict[int, np.ndarray]:
    """The pictures, once all are drawn."""
    found: dict[int, np.ndarray] = {}
    while len(found) < len(ids):
        event = engine.next()
        assert not failures([event])
        if isinstance(event, Drawn):
            assert isinstance(event.picture, bytes)
            found[event.id] = np.asarray(Image.open(BytesIO(event.picture)))
    return found


def draw(engine: Driven, id_: int) -> np.ndarray:
    """Take both steps of a picture whose K/V are there."""
    for _ in range(SETTINGS.steps - 1):
        engine.send(StepPlan((id_,), read=False))
    return pixels(engine, [id_])[id_]


def begin(engine: Driven, id_: int) -> Begun:
    """All K/V of a picture have landed."""
    engine.send(Begin(id_))
    event = engine.until(Begun)[-1]
    assert isinstance(event, Begun) and event.id == id_
    return event


@cache
def plain(llm: LlmConfig, id_: int, device: str) -> np.ndarray:
    """The same picture, drawn when all of its K/V are there."""
    with driven(memory(llm), device) as engine:
        engine.send(picture(id_))
        for number in range(llm.num_hidden_layers):
            engine.send(LoadPages(id_, layer(llm, number)))
        begin(engine, id_)
        return draw(engine, id_)


@pytest.mark.parametrize("device", DEVICES)
def test_from_a_third_of_them_on_each_layer_is_computed_as_soon_as_it_is_there_and_once(
    llm: LlmConfig, device: str
) -> None:
    count, least = llm.num_hidden_layers, 2
    with driven(memory(llm), device) as engine, computed(engine) as numbers:
        engine.send(picture(1))
        before = time.monotonic()
        for number in range(count - 1):
            land(engine, llm, 1, [number])
            assert numbers == list(range(number + 1 if number + 1 >= least else 0))
        land(engine, llm, 1, [count - 1])
        begun = begin(engine, 1)
        assert begun.layers_ahead == count - 1
        assert begun.first_step_at is not None and before < begun.first_step_at < time.monotonic()
        drawn = draw(engine, 1)
        assert numbers == 2 * list(range(count))
    assert np.array_equal(drawn, plain(llm, 1, device))


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_other_pictures_between_two_layers_change_none(llm: LlmConfig, device: str) -> None:
    with driven(memory(llm), device) as engine:
        for id_ in (1, 2):
            engine.send(picture(id_))
        land(engine, llm, 1, range(llm.num_hidden_layers))
        begin(engine, 1)
        land(engine, llm, 2, [0, 1])
        engine.send(StepPlan((1,), read=False))
        land(engine, llm, 2, range(2, llm.num_hidden_layers))
        begin(engine, 2)
        # The second step of the one with the first of the other, which is half done.
        engine.send(StepPlan((1, 2), read=False))
        engine.send(StepPlan((2,), read=False))
        drawn = pixels(engine, [1, 2])
    for id_ in (1, 2):
        assert np.array_equal(drawn[id_], plain(llm, id_, device))


def test_a_step_is_told_with_the_time_of_its_early_layers(llm: LlmConfig) -> None:
    early = llm.num_hidden_layers - 1
    with driven(memory(llm)) as engine:
        engine.send(picture(1))
        with computed(engine, pause_s=PAUSE_S):
            land(engine, llm, 1, range(early))
        land(engine, llm, 1, [early])
        begin(engine, 1)
        engine.send(StepPlan((1,), read=False))
        stepped = engine.until(Stepped)[-1]
        assert isinstance(stepped, Stepped)
        (timed,) = stepped.timed
        assert timed.requests == 1 and timed.seconds > early * PAUSE_S


def test_with_the_profiler_a_first_step_waits_for_all_kv(llm: LlmConfig) -> None:
    with driven(memory(llm), profile=True) as engine, computed(engine) as numbers:
        engine.send(picture(1))
        for number in range(llm.num_hidden_layers):
            engine.send(LoadPages(1, layer(llm, number)))
        engine.send(Begin(1))
        (begun,) = engine.until(Begun)
        assert isinstance(begun, Begun) and not begun.layers_ahead and begun.first_step_at is None and not numbers


def test_no_more_than_one_picture_is_computed_ahead(llm: LlmConfig) -> None:
    with driven(memory(llm)) as engine, computed(engine) as numbers:
        engine.send(picture(1))
        engine.send(picture(2))
        land(engine, llm, 1, [0, 1])
        land(engine, llm, 2, [0, 1])
        assert numbers == [0, 1]
        engine.send(Remove(1))
        land(engine, llm, 2, [2])
        assert numbers == [0, 1, 0, 1, 2]
        gc.collect()  # the engines of other tests
        assert sum(type(each) is EarlyStep for each in gc.get_objects()) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_picture_that_leaves_half_way_changes_none_that_takes_its_place(llm: LlmConfig, device: str) -> None:
    with driven(memory(llm), device) as engine:
        engine.send(picture(1))
        land(engine, llm, 1, range(llm.num_hidden_layers - 1))
        engine.send(Remove(1))
        engine.send(Advance(1))
        engine.send(picture(2))
        land(engine, llm, 2, range(llm.num_hidden_layers))
        begin(engine, 2)
        assert np.array_equal(draw(engine, 2), plain(llm, 2, device))


def test_a_small_picture_waits_for_all_of_its_kv(llm: LlmConfig) -> None:
    with driven(memory(llm)) as engine, computed(engine) as numbers:
        engine.send(picture(1, grid=(4, 4)))
        for number in range(llm.num_hidden_layers):
            engine.send(LoadPages(1, layer(llm, number)))
        engine.send(Begin(1))
        (begun,) = engine.until(Begun)
        assert isinstance(begun, Begun) and not begun.layers_ahead and begun.first_step_at is None and not numbers
