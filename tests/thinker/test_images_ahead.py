"""Images to edit: encoded before their request is known, and computed with the text behind them."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from PIL import Image

from bagel.engine.context import ContextBuilder
from bagel.engine.segments import Chain, Segment
from bagel.errors import InvalidImage, NotSupported, StoreFull
from bagel.images import colour, pool
from bagel.kv.digests import SegmentKind
from bagel.model.vae import Vae
from bagel.v1 import common_pb2, thinker_pb2
from bagel_thinker.server import ThinkerServicer
from bagel_thinker.torch_engine import TorchEngine
from tests.helpers import sketch
from tests.thinker.served import LIMIT_S, Served, build, served


def saved(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def edit(image: bytes, *, kv: bool = True) -> thinker_pb2.BuildContextRequest:
    part = common_pb2.Part(image=common_pb2.ImagePart(data=image, for_generation=True))
    text = common_pb2.Part(text=common_pb2.TextPart(text="make it blue"))
    return thinker_pb2.BuildContextRequest(parts=[part, text], send_kv=kv)


class Encoded:
    """Counts what an engine's VAE encodes, and the segments that it computes together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.units, self.began = list[tuple[int, ...]](), list[list[SegmentKind]](), threading.Event()
        encode, compute = Vae.encode, ContextBuilder._compute

        def encoded(vae: Vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.images.append(tuple(pixels.shape))
            self.began.set()
            return encode(vae, pixels)

        def computed(builder: ContextBuilder, segments: Sequence[tuple[Segment, slice]], *rest: Any) -> None:
            self.units.append([segment.kind for segment, _ in segments])
            compute(builder, segments, *rest)

        monkeypatch.setattr(Vae, "encode", encoded)
        monkeypatch.setattr(ContextBuilder, "_compute", computed)


def test_an_image_to_edit_is_encoded_while_it_is_still_hashed_and_resized(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, digest = Encoded(monkeypatch), colour.digest_of_pixels

    def late(*image: Any) -> bytes:
        assert encoded.began.wait(LIMIT_S)
        return digest(*image)

    async def test(at: Served) -> None:
        files = [saved(sketch(112, 80, colour)) for colour in ("crimson", "navy")]
        for request in (edit(files[0]), edit(files[1], kv=False)):
            encoded.units.clear()
            [*_, last] = [event async for event in at.stub.BuildContext(request, timeout=LIMIT_S)]
            assert encoded.units == [[SegmentKind.VAE, SegmentKind.VIT, SegmentKind.TEXT]]
            usage = last.built.usage
            assert (usage.computed_tokens, usage.reused_tokens) == (usage.prompt_tokens + usage.image_tokens, 0)
        assert len(encoded.images) == 2
        stats = engine.store.stats()
        assert stats.stored_bytes == stats.computed_bytes > 0 and stats.computed_segments == 3

    monkeypatch.setattr(pool, "digest_of_pixels", late)
    served(engine, test)


def test_each_layer_of_an_image_shows_that_the_engine_does_not_hang(engine: TorchEngine) -> None:
    steps: list[object] = []
    layers = engine._loaded.model.language_model.layers
    hooks = [layer.register_forward_hook(lambda *_: steps.append(engine.pulse.step)) for layer in layers]

    async def test(at: Served) -> None:
        assert not await at.text(edit(saved(sketch()), kv=False))
        assert len(set(steps)) == len(steps) == 3 * len(layers)

    served(engine, test)
    for hook in hooks:
        hook.remove()


def test_of_contexts_with_one_image_the_first_to_come_is_computed_first(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the text behind the image, which is computed with it: a picture's first step needs the K/V of both."""
    encoded, plan = Encoded(monkeypatch), ThinkerServicer._plan

    def slowly(servicer: ThinkerServicer, request: thinker_pb2.BuildContextRequest, *rest: Any) -> Chain:
        if len(request.parts) == 2:
            time.sleep(0.2)
        return plan(servicer, request, *rest)

    async def test(at: Served) -> None:
        whole = edit(saved(sketch()))
        without_text = thinker_pb2.BuildContextRequest(parts=whole.parts[:1], send_kv=True)
        first = asyncio.create_task(at.text(whole))
        await asyncio.sleep(0.05)
        assert not await at.text(without_text) and not await first
        assert encoded.units == [[SegmentKind.VAE, SegmentKind.VIT, SegmentKind.TEXT]]

    monkeypatch.setattr(ThinkerServicer, "_plan", slowly)
    served(engine, test)


def test_where_others_wait_for_room_nothing_is_begun_without_it(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, store = Encoded(monkeypatch), engine.store

    async def test(at: Served) -> None:
        full = store.lease([(bytes(16), store.capacity_bytes // store.layout.segment_bytes(1))], LIMIT_S)
        waiting = asyncio.create_task(at.text(build()))
        while not store._ledger.room_waiters:
            await asyncio.sleep(0.01)
        with pytest.raises(StoreFull):
            await at.text(edit(saved(sketch())))
        with pytest.raises(StoreFull):
            await waiting
        assert not encoded.images and not encoded.units
        store.release([full])
        assert await at.text(build())

    served(engine, test)


def test_an_image_is_not_encoded_for_a_request_that_has_failed(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, asked = threading.Event(), threading.Event()
    encoded, ahead = Encoded(monkeypatch), TorchEngine.encode_ahead

    def busy() -> None:
        go.wait(LIMIT_S)

    def begin(engine: TorchEngine, image: Image.Image) -> Future[None]:
        asked.set()
        return ahead(engine, image)

    async def test(at: Served) -> None:
        request = edit(saved(sketch()))
        request.parts.add().image.data = b"no image"
        engine._commands.put(busy)
        with pytest.raises(InvalidImage):
            await at.text(request)
        assert asked.is_set()
        go.set()
        assert await at.text(build())
        assert not encoded.images

    monkeypatch.setattr(TorchEngine, "encode_ahead", begin)
    served(engine, test)


def test_an_image_that_cannot_be_encoded_ahead_fails_its_request_alone(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, asked, ahead = threading.Event(), threading.Event(), TorchEngine.encode_ahead

    def fails(vae: Vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotSupported("image", "no VAE here")

    def begin(engine: TorchEngine, image: Image.Image) -> Future[None]:
        begun = ahead(engine, image)
        asked.set()
        return begun

    def busy() -> None:
        go.wait(LIMIT_S)

    async def test(at: Served) -> None:
        engine._commands.put(busy)
        writing = asyncio.create_task(at.text(build()))
        while engine._commands.empty():
            await asyncio.sleep(0.01)
        edited = asyncio.create_task(at.text(edit(saved(sketch()))))
        assert await asyncio.to_thread(asked.wait, LIMIT_S)
        go.set()
        with pytest.raises(NotSupported, match="no VAE here"):
            await edited
        assert await writing

    monkeypatch.setattr(Vae, "encode", fails)
    monkeypatch.setattr(TorchEngine, "encode_ahead", begin)
    served(engine, test)
