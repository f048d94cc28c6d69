"""The warm-up before a service is ready: it runs every kind of work once, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch

from bagel.checkpoint.roles import Role
from bagel.engine import warm_up as warming
from bagel.engine.engine import Engine
from bagel.engine.events import Event
from bagel.engine.loading import LoadedModel
from bagel.engine.local import BagelEngine
from bagel.errors import OutOfMemory
from bagel.parity.record import Recorder
from tests.helpers import request, small_images


@contextmanager
def small(engine: BagelEngine, kv_device_bytes: int | None = None) -> Iterator[tuple[Engine, SimpleQueue[Event]]]:
    """An engine whose default picture has 12 latents, and that decodes three texts at once."""
    loaded = small_images(engine).loaded
    loaded.model.config = replace(loaded.model.config, default_image_size=(48, 64))
    events: SimpleQueue[Event] = SimpleQueue()
    made = Engine(loaded, events.put, max_num_seqs=3, kv_device_bytes=kv_device_bytes)
    yield made, events
    made.close()


def rows_and_latents(record: Recorder) -> list[tuple[int, int]]:
    """Rows and latents a row of each forward."""
    return [(len(und), 0 if gen is None else gen.shape[1]) for und, gen, *_ in record.all("decoder.in")]


def decodes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes that the autoencoder decodes from now on."""
    vae, sizes = engine.loaded.model.autoencoder(), list[tuple[int, ...]]()
    decode = vae.decode

    def seen(latent: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(latent.shape[-2:]))
        return decode(latent)

    monkeypatch.setattr(vae, "decode", seen)
    return sizes


def test_every_kind_of_work_runs(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(engine) as (made, _):
        decoded = decodes(made, monkeypatch)
        with Recorder(made.loaded.model) as record:
            made.warm_up()
    assert [len(logits) for logits in record.all("lm_head.out")] == [1, 2, 3]
    assert {"encoder.in", "vit.in"} <= set(record.calls)
    drawn = [rows for rows, latents in rows_and_latents(record) if latents == 12]
    assert drawn[-3:] == [1, 2, 3]
    assert decoded == [(6, 8), (6, 8)]


def test_nothing_of_it_stays(engine: BagelEngine) -> None:
    with small(engine) as (made, events):
        assert made.single_stage is not None
        made.warm_up()
        assert events.empty()
        assert made.space.taken == 0
        assert made.space.has_room("the next", [made.space.size])  # and nobody is before it in line
        assert made.single_stage.segments_computed == 0
        assert made.single_stage._cache.nbytes == 0
        assert not made.single_stage.busy


def test_a_warm_engine_serves_as_a_cold_one(engine: BagelEngine) -> None:
    ask = request("text2img", steps=3)
    warm = small_images(engine)
    warm._engine.loaded.model.config = replace(warm.model.config, default_image_size=(48, 64))
    warm._engine.warm_up()
    (ours,), (wanted,) = warm.generate([ask]), small_images(engine).generate([ask])
    assert ours.image is not None and wanted.image is not None
    assert ours.image.tobytes() == wanted.image.tobytes()


def test_where_a_picture_has_no_room_the_rest_is_warmed(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    token = engine.model.kv_shape.token_bytes(engine.model.dtype)
    with small(engine, kv_device_bytes=20 * token) as (made, _):  # a row is 14 tokens
        decoded = decodes(made, monkeypatch)
        with Recorder(made.loaded.model) as record:
            made.warm_up()
        assert made.space.taken == 0
    assert [rows for rows, latents in rows_and_latents(record) if latents == 12][-1:] == [1]
    assert len(decoded) == 2


def test_a_model_that_only_draws_reads_nothing(engine: BagelEngine) -> None:
    with small(engine) as (full, _):
        loaded: LoadedModel = replace(full.loaded, role=Role.DENOISE)
    made = Engine(loaded, lambda event: None)
    with Recorder(loaded.model) as record:
        made.warm_up()
    made.close()
    # Of the default size, half and a quarter of its sides.
    assert rows_and_latents(record) == [(rows, latents) for latents in (12, 2, 1) for rows in (1, 2, 3)]


def test_too_little_memory_names_the_remedy(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(warming, "_draw", full)
    with small(engine) as (made, _), pytest.raises(OutOfMemory, match="default size; lower kv_device_bytes"):
        made.warm_up()
