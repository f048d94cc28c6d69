"""The Thinker's engine thread: what escapes from it is told to everybody, and never leaves a request waiting."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from bagel.deployment.thinker_config import ThinkerConfig
from bagel.engine.context import ContextBuilder
from bagel.engine.text_scheduler import TextScheduler
from bagel.errors import BagelError, EngineDied, InvalidImage
from bagel.images import ImageTransform
from bagel.images.pool import ImagePool
from bagel.rpc import service
from bagel.rpc.transport import Host
from bagel_thinker.server import FEW_BUILDS, MESSAGES_PER_S, pause_s
from bagel_thinker.torch_engine import TorchEngine
from tests.thinker.served import LIMIT_S, PLACES, Served, build, served


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
