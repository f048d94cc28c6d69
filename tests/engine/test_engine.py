"""The engine as a user has it: reproducible, the same batched or one by one, and clear when it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.engine import decoding, vae_worker
from bagel.engine.local import BagelEngine
from bagel.errors import InvalidRequest, NotFinite
from bagel.events import Event, Result, StepDone, TextDelta
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality, resolve
from tests.helpers import agree, request, sketch, small_images


def test_two_runs_with_one_seed_give_identical_bytes(engine: BagelEngine) -> None:
    asked = [request("text2img"), request("img2img"), request("text2img", think=True)]
    first, second = (small_images(engine).generate(asked) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.image is not None and other.image is not None
        assert one.image.tobytes() == other.image.tobytes()
        assert one.text == other.text


def test_another_seed_is_another_picture(engine: BagelEngine) -> None:
    one, other = engine.generate([request("text2img", seed=1), request("text2img", seed=2)])
    assert one.image is not None and other.image is not None
    assert np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).mean() > 5


MIXED = [
    request("text2img", "a red cup", seed=1),
    request("text2img", "a boat on the lake at night", seed=2, height=96, width=64, steps=7),
    request("img2img", "make it snow", seed=3),
    request("img2img", "turn it blue", sketch(64, 96, "navy"), seed=4, steps=4),
    request("text2img", "a village", seed=5, think=True),
    request("img2img", "an oil painting", seed=6, think=True, max_think_tokens=5),
    request("img2text", "what is it?", max_tokens=9),
    request("img2text", "which shape?", sketch(64, 64), think=True),
    request("text2text", "how many cups?", max_tokens=12),
    request("text2text", "how many cups?", do_sample=True, temperature=1.0, max_tokens=6),
]


def test_batched_and_one_by_one_agree(engine: BagelEngine) -> None:
    batched = small_images(engine).generate(MIXED)
    for asked, together in zip(MIXED, batched, strict=True):
        (alone,) = small_images(engine).generate([asked])
        assert together.text == alone.text
        assert together.token_ids == alone.token_ids
        assert (together.image is None) == (alone.image is None)
        if together.image is not None and alone.image is not None:
            assert agree(together.image, alone.image)


def test_a_limit_on_the_batch_changes_no_result(engine: BagelEngine) -> None:
    asked = [request("text2img", seed=seed) for seed in range(3)] + [request("text2text", max_tokens=4)] * 2
    wide, narrow = small_images(engine).generate(asked), small_images(engine, max_num_seqs=1).generate(asked)
    for one, other in zip(wide, narrow, strict=True):
        assert one.text == other.text
        assert one.image is None or (other.image is not None and agree(one.image, other.image))


def test_events_tell_everything_in_order(engine: BagelEngine) -> None:
    events: list[Event] = []
    results = small_images(engine).generate([request("text2img", think=True), request("text2text")], events.append)
    for index, result in enumerate(results):
        mine = [event for event in events if event.index == index]
        assert mine[-1] == result
        assert "".join(event.text for event in mine if isinstance(event, TextDelta)) == result.text
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(event.step, event.steps) for event in steps] == [(i, 4) for i in range(1, 5)]
    assert {event.think for event in events if isinstance(event, TextDelta) and event.index == 0} == {True}
    assert isinstance(events[-1], Result)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 80, (80, 64)), (70, 90, (80, 64)), (None, 64, (64, 1024)), (1039, 16, (16, 1024))],
)
def test_sizes_are_rounded_down_to_the_grid(
    engine: BagelEngine, height: int | None, width: int, size: tuple[int, int]
) -> None:
    (result,) = engine.generate([request("text2img", height=height, width=width, steps=2)])
    assert result.image is not None and result.image.size == size


def test_an_edit_has_the_resized_inputs_size_unless_one_is_given(engine: BagelEngine) -> None:
    own, given = small_images(engine).generate([request("img2img"), request("img2img", height=64, width=96)])
    assert own.image is not None and own.image.size == (112, 80)
    assert given.image is not None and given.image.size == (96, 64)


@pytest.mark.parametrize(
    ("height", "width", "field"), [(1040, 64, "height"), (64, 1040, "width"), (64, 100_000, "width")]
)
def test_a_size_without_positions_is_refused(engine: BagelEngine, height: int, width: int, field: str) -> None:
    with pytest.raises(InvalidRequest, match="16 to 1024 pixels") as error:
        engine.generate([request("text2img", height=height, width=width)])
    assert error.value.field == field


def test_a_text_beyond_the_last_position_is_refused_before_anything_runs(engine: BagelEngine) -> None:
    small = small_images(engine, max_model_len=64)
    with pytest.raises(InvalidRequest, match="the limit is 64"):
        small.generate([request("text2text", max_tokens=64)])
    assert small.segments_computed == 0


def test_the_answer_ends_at_its_limit_or_at_a_stop_token(engine: BagelEngine) -> None:
    (whole,) = engine.generate([request("text2text", max_tokens=12)])
    assert len(whole.token_ids) == 12
    stop = whole.token_ids[4]
    (short,) = engine.generate([request("text2text", max_tokens=12, stop_token_ids=[stop])])
    assert short.token_ids == whole.token_ids[: whole.token_ids.index(stop)]


def test_the_repetition_penalty_drives_repeats_out(engine: BagelEngine) -> None:
    (plain,) = engine.generate([request("text2text", max_tokens=40)])
    (punished,) = engine.generate([request("text2text", max_tokens=40, repetition_penalty=5.0)])
    assert len(set(punished.token_ids)) > len(set(plain.token_ids))


def test_a_negative_prompt_and_guidance_change_the_picture(engine: BagelEngine) -> None:
    plain, negative, free = engine.generate(
        [request("text2img"), request("text2img", negative_prompt="blue"), request("text2img", cfg_text_scale=1.0)]
    )
    pictures = [result.image.tobytes() for result in (plain, negative, free) if result.image is not None]
    assert len(set(pictures)) == 3


def test_a_picture_that_overflowed_is_an_error_and_not_a_picture(engine: BagelEngine) -> None:
    model = copy(engine.model)
    model._modules = dict(model._modules)
    model.llm2vae = deepcopy(model.llm2vae)
    assert model.llm2vae is not None
    model.llm2vae.bias[0] = float("inf")
    broken = BagelEngine(replace(engine.loaded, model=model))
    with pytest.raises(NotFinite, match="smaller"):
        broken.generate([request("text2img")])


def test_an_overflow_leaves_the_others_their_pictures(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    decode, calls = decoding.decode_picture, []

    def overflow_first(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args)
        return decode(*args, **options) * (float("inf") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(vae_worker, "decode_picture", overflow_first)
    with pytest.raises(NotFinite):
        small_images(engine).generate([request("text2img", seed=1), request("text2img", seed=2)], events.append)
    assert [event.index for event in events if isinstance(event, Result)] == [1]


def test_a_call_that_is_interrupted_leaves_the_engine_as_it_was(engine: BagelEngine) -> None:
    small = small_images(engine)
    asked = [request("text2img", seed=1), request("text2img", seed=2, think=True)]

    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.generate(asked, interrupt)
    for again, wanted in zip(small.generate(asked), small_images(engine).generate(asked), strict=True):
        assert again.image is not None and wanted.image is not None
        assert again.text == wanted.text and agree(again.image, wanted.image)


def test_calls_from_two_threads_are_served_one_after_the_other(engine: BagelEngine) -> None:
    small = small_images(engine)
    asked = [request("text2img", seed=seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda one: small.generate([one]), asked))
    for (ours,), alone in zip(both, small_images(engine).generate(asked), strict=True):
        assert ours.image is not None and alone.image is not None
        assert agree(ours.image, alone.image)


def test_one_image_standing_twice_is_two_images(engine: BagelEngine) -> None:
    small = small_images(engine)
    part = ImagePart(sketch(), for_generation=True)
    again = ImagePart(sketch(), for_generation=True)
    text = TextPart("put them together")
    options = {"steps": 4, "seed": 3, "posterior": "seed"}
    same, equal = small.generate(
        [resolve(Modality.IMG2IMG, prompt, options) for prompt in ((part, part, text), (part, again, text))]
    )
    assert same.image is not None and equal.image is not None
    assert agree(same.image, equal.image)


def test_a_long_negative_prompt_is_refused_too(engine: BagelEngine) -> None:
    small = small_images(engine, max_model_len=64)
    with pytest.raises(InvalidRequest, match="the limit is 64"):
        small.generate([request("text2img", negative_prompt="blue " * 100)])


@pytest.mark.slow
def test_tiling_leaves_small_pictures_as_they_are(checkpoint: Checkpoint, engine: BagelEngine) -> None:
    tiled = BagelEngine.load(checkpoint, vae_use_tiling=True)
    asked = [request("text2img"), request("text2img", height=528, width=640, steps=2)]
    for one, other in zip(tiled.generate(asked), engine.generate(asked), strict=True):
        assert one.image is not None and other.image is not None
        difference = np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int))
        assert difference.mean() < 3
        assert bool(difference.max()) is (one.index == 1)
