"""The Thinker's engine thread: what escapes from it is told to everybody, and never leaves a request waiting."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.engine.context import ContextBuilder
from bagel.engine.segments import Chain, Segment
from bagel.engine.text_scheduler import TextScheduler
from bagel.errors import BagelError, EngineDied, InvalidImage, NotSupported, StoreFull
from bagel.images import ImageTransform, colour, pool
from bagel.images.pool import ImagePool
from bagel.kv.digests import SegmentKind
from bagel.model.vae import Vae
from bagel.rpc import service
from bagel.rpc.admission import Admission
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.transport import Host, channel
from bagel.v1 import common_pb2, thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub, add_ThinkerServiceServicer_to_server
from bagel_thinker.server import FEW_BUILDS, MESSAGES_PER_S, ThinkerServicer, pause_s
from bagel_thinker.torch_engine import TorchEngine
from tests.helpers import sketch

LIMIT_S = 30
PLACES = 4


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Iterator[TorchEngine]:
    engine = TorchEngine.load("tiny", checkpoint, device="cpu", dtype="auto", kv_store_bytes=2**24, max_num_seqs=4)
    yield engine
    engine.close()


def build(text: str = "a red cup", max_tokens: int = 3, *, kv: bool = True) -> thinker_pb2.BuildContextRequest:
    settings = common_pb2.TextSettings(max_tokens=max_tokens)
    decode = thinker_pb2.DecodeText(settings=settings, append=kv)
    part = common_pb2.Part(text=common_pb2.TextPart(text=text))
    return thinker_pb2.BuildContextRequest(parts=[part], decode=decode, send_kv=kv)


def test_a_warm_up_runs_on_the_engines_thread_and_leaves_nothing(engine: TorchEngine) -> None:
    loaded = engine._loaded
    config = replace(
        loaded.model.config,
        default_image_size=(48, 64),
        vae_transform=ImageTransform(128, 64, 16),
        vit_transform=ImageTransform(140, 56, 14),
    )
    loaded.model.config = engine.planner.config = config
    threads: list[str] = []
    handle = loaded.model.language_model.layers.register_forward_hook(
        lambda *_: threads.append(threading.current_thread().name)
    )
    before = engine.store.stats()
    engine.warm_up()
    handle.remove()
    assert set(threads) == {"torch-engine"} and len(threads) == 1 + 3  # an image with its text; 1, 2 and 4 texts
    assert engine._space.taken == 0
    assert engine.store.stats() == before


class Served:
    """An engine behind a Thinker's server."""

    def __init__(self, engine: TorchEngine, host: Host, target: str, stub: Any, health: Any) -> None:
        self.engine, self.host, self.target, self.stub, self._health = engine, host, target, stub, health

    async def text(self, request: thinker_pb2.BuildContextRequest) -> str:
        """The text that is written; raises what the call ends with."""
        try:
            events = [event async for event in self.stub.BuildContext(request, timeout=LIMIT_S)]
        except Exception as error:
            raise from_rpc_error(error, "thinker") from None  # type: ignore[arg-type]
        assert isinstance(events[-1], thinker_pb2.BuildContextResponse)
        return events[-1].built.text

    async def health(self) -> int:
        return int((await self._health.Check(health_pb2.HealthCheckRequest())).status)


def served(engine: TorchEngine, test: Callable[[Served], Awaitable[None]]) -> None:
    """Run a test with a Thinker's server."""

    async def main() -> None:
        host = Host("127.0.0.1:0", ["bagel.v1.ThinkerService"])
        admission, pool = Admission("thinker", PLACES, 5.0), ImagePool(2)
        servicer = ThinkerServicer(engine, "thinker", admission, pool, lease_s=5, room_wait_s=1, draining=host.draining)
        add_ThinkerServiceServicer_to_server(servicer, host.methods)
        await host.start()
        await host.ready()
        target = f"127.0.0.1:{host.port}"
        try:
            async with asyncio.timeout(LIMIT_S), channel(target) as connection:
                stub, health = ThinkerServiceStub(connection), health_pb2_grpc.HealthStub(connection)
                await test(Served(engine, host, target, stub, health))
        finally:
            await host.server.stop(None)
            await pool.close()

    asyncio.run(main())


def breaks(patch: pytest.MonkeyPatch, owner: type, name: str, after: int = 0) -> threading.Event:
    """Let a method work so many times and then raise; the event is set once it has raised."""
    right, calls, raised = getattr(owner, name), iter(range(10**9)), threading.Event()

    def call(*args: Any) -> Any:
        if next(calls) < after:
            return right(*args)
        raised.set()
        raise RuntimeError("out of luck")

    patch.setattr(owner, name, call)
    return raised


def test_pieces_of_many_texts_are_joined_and_those_of_few_are_not() -> None:
    assert pause_s(1) == pause_s(FEW_BUILDS) == 0
    for builds in (FEW_BUILDS + 1, 64, 256):
        assert builds / pause_s(builds) == pytest.approx(MESSAGES_PER_S)


def test_many_texts_come_whole_in_fewer_pieces(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_thinker.server.pause_s", lambda builds: 0.5)

    async def test(at: Served) -> None:
        events = [event async for event in at.stub.BuildContext(build(max_tokens=40, kv=False), timeout=LIMIT_S)]
        pieces = [event.text.text for event in events if event.HasField("text")]
        assert "".join(pieces) == events[-1].built.text and 1 <= len(pieces) < 10

    served(engine, test)


def test_what_escapes_fails_every_request_and_the_next_one_works(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(at: Served) -> None:
        whole = await at.text(build(kv=False))
        with monkeypatch.context() as patch:
            breaks(patch, TextScheduler, "work", after=5)
            asked = [at.text(build(text, max_tokens=500)) for text in ("a red cup", "a blue cup")]
            told = await asyncio.gather(*asked, return_exceptions=True)
        assert [getattr(error, "grpc_status", "") for error in told] == ["INTERNAL"] * 2
        assert all("internal error of the engine: RuntimeError" in str(error) for error in told)
        assert (engine.store.stats().leases, engine.store.stats().held_bytes) == (0, 0)
        assert await at.health() == health_pb2.HealthCheckResponse.SERVING and not engine.failed.done()
        assert await at.text(build(kv=False)) == whole

    with caplog.at_level(logging.ERROR, "bagel.thinker"):
        served(engine, test)
    (record,) = [record for record in caplog.records if record.message == "the engine failed"]
    assert record.exc_info is not None and "out of luck" in str(record.exc_info[1])


def test_a_request_that_cannot_be_taken_on_is_told(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(at: Served) -> None:
        with monkeypatch.context() as patch:
            breaks(patch, TextScheduler, "add")
            with pytest.raises(BagelError, match="internal error"):
                await at.text(build())
        assert await at.text(build())

    served(engine, test)


def test_an_engine_that_cannot_go_on_ends_its_service(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(at: Served) -> None:
        serving = asyncio.create_task(service.serve(at.host, 5, asyncio.wrap_future(engine.failed)))
        with monkeypatch.context() as patch:
            broken = breaks(patch, ContextBuilder, "build")
            breaks(patch, TextScheduler, "work", after=2)
            # Either, as the engine may have given up before its first error is on its way.
            with pytest.raises(BagelError, match=r"internal error of the engine|engine cannot go on"):
                await at.text(build(max_tokens=500))
            await asyncio.to_thread(broken.wait, LIMIT_S)
        with pytest.raises(BagelError) as caught:
            await at.text(build())
        assert caught.value.grpc_status == "UNAVAILABLE"
        with pytest.raises(EngineDied) as ended:
            await serving
        assert ended.value.exit_code == 1
        assert (engine.store.stats().leases, engine.store.stats().held_bytes) == (0, 0)

    served(engine, test)


def test_an_engine_that_has_failed_takes_nothing_on(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(at: Served) -> None:
        with monkeypatch.context() as patch:
            breaks(patch, ContextBuilder, "build")
            breaks(patch, TextScheduler, "work")
            with pytest.raises(BagelError, match="internal error of the engine"):
                await at.text(build())
            await asyncio.wait([asyncio.ensure_future(asyncio.wrap_future(engine.failed))])
        with pytest.raises(EngineDied, match="cannot go on"):
            await at.text(build())

    served(engine, test)


def test_the_process_ends_with_its_service(tmp_path: Path) -> None:
    """What `service.serve` raises is one line on stderr and exit code 1."""

    async def failing(args: object) -> None:
        host = Host("127.0.0.1:0", ())
        await host.start()
        await host.ready()
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(EngineDied("it is over"))
        await service.serve(host, 5, failed)

    config = ThinkerConfig(model=str(tmp_path))
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        assert service.run(lambda: config, failing, "thinker") == 1
    finally:
        root.handlers[:], root.level = before[0], before[1]


def test_a_lease_that_is_given_back_early_takes_nothing_from_the_build(engine: TorchEngine) -> None:
    """A DiT that has the K/V already needs them no more, while a Thinker that was started again computes them."""
    store, lease = engine.store, "of-the-dit"

    def give_back(*page: object) -> None:
        store.release([lease])

    async def test(at: Served) -> None:
        request = build(max_tokens=3)
        request.lease_id = lease
        stop = store.subscribe(give_back)  # with the first page
        with pytest.raises(BagelError, match=lease):  # the think text finds no lease that it could be kept under
            await at.text(request)
        request.ClearField("decode")
        request.parts[0].text.text = "a blue cup"
        await at.text(request)
        stop()
        assert store.stats().held_bytes == 0 < store.stats().stored_bytes == store.stats().computed_bytes

    served(engine, test)


def test_images_that_are_read_keep_no_text_from_its_place(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, read = asyncio.Event(), asyncio.Event()

    async def slowly(*args: Any, **options: Any) -> Any:
        reading.set()
        await read.wait()
        raise InvalidImage("image", "read at last")

    async def test(at: Served) -> None:
        described = build()
        described.parts.add().image.data = b"an image"
        with monkeypatch.context() as patch:
            patch.setattr(ImagePool, "resized", slowly)
            many = [asyncio.create_task(at.text(described)) for _ in range(PLACES)]
            await reading.wait()
            assert await at.text(build())
            assert not any(task.done() for task in many)
            read.set()
            told = await asyncio.gather(*many, return_exceptions=True)
        assert all(isinstance(error, InvalidImage) for error in told)

    served(engine, test)


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
