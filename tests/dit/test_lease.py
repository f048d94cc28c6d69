"""A DiT whose own lease on K/V lapses: whatever has become of them meanwhile, no picture is drawn from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from bagel.engine.commands import Begin, LoadPages
from bagel.engine.events import Begun, Done
from bagel.errors import BagelError, LeaseLapsed
from bagel.images.pool import ImagePool
from bagel.kv.puller import KvPuller
from bagel.kv.store import KvStore
from bagel.request import ImageSettings
from bagel.rpc.convert import image_settings_to_wire
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.transport import Host
from bagel.v1 import dit_pb2, dit_pb2_grpc
from bagel_dit.server import DitServicer
from tests.gateway_stages import model
from tests.kv.pair import FINGERPRINT, LAYOUT, SEGMENTS, Pair, fill, has, run

TTL_S = 30.0


@dataclass
class Runner:
    """In place of the ranks: it copies pages at once, and `meanwhile` happens before it says that it has copied all."""

    meanwhile: Callable[[], None] = lambda: None
    info: Any = field(default_factory=model)
    kv_tokens: int = 100_000
    context_ranks: int = 1
    here: bool = True
    nodes: Any = ()
    pages: int = 0
    began: list[int] = field(default_factory=list)

    def listen(self, id_: int, events: asyncio.Queue[Any]) -> None:
        self.events = events

    def forget(self, id_: int) -> None:
        pass

    def send(self, command: object) -> None:
        if isinstance(command, LoadPages):
            self.pages += len(command.pages)
        if isinstance(command, Begin):
            self.meanwhile()
            self.events.put_nowait(Begun(command.id, 3, 16, 1))

    def begin(self, begun: Begun) -> None:
        self.began.append(begun.id)
        self.events.put_nowait(Done(begun.id))


@dataclass
class Clock:
    """Time that passes when the test says."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def stand_still(self) -> None:
        """As when the service is stopped for longer than its lease runs."""
        self.now += TTL_S + 1


async def draw(pair: Pair, runner: Runner, store: KvStore, ref: Any) -> None:
    """A picture of one context, from a real DiT service; raises what it fails with."""
    puller: Any = KvPuller(store, {"thinker": pair.channel}, lease_ttl_s=TTL_S)
    driver: Any = runner
    dit = DitServicer(
        "dit-0",
        driver,
        puller,
        ImagePool(2),
        sources=("thinker",),
        max_num_seqs=1,
        batch_timeout_s=0,
        draining=asyncio.Event(),
    )
    host = Host("127.0.0.1:0", ())
    dit_pb2_grpc.add_DitServiceServicer_to_server(dit, host.methods)
    await host.start()
    settings = image_settings_to_wire(ImageSettings(cfg_text_scale=1.0, height=64, width=64))
    ref.next_rope = 0
    work = dit_pb2.DrawPicture(
        contexts=[dit_pb2.BranchContext(branch=dit_pb2.BRANCH_NAME_GEN, context=ref)], image=settings
    )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{host.port}") as channel:
            call = dit_pb2_grpc.DitServiceStub(channel).Generate(dit_pb2.DitServiceGenerateRequest(draw=work))
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, "dit-0") from None
    finally:
        await puller.close()
        await host.drain(0)


def test_a_picture_is_begun_only_under_a_lease_that_never_lapsed() -> None:
    async def test(pair: Pair) -> None:
        clock = Clock()
        store = KvStore(LAYOUT, FINGERPRINT, 64 << 20, clock=clock)
        runner = Runner()
        ref = pair.ref()
        fill(pair.there)
        await draw(pair, runner, store, ref)
        assert len(runner.began) == 1 and runner.pages == LAYOUT.layers * 3

        def lapse() -> None:
            """Another request needs the room, and gets it."""
            clock.stand_still()
            store.lease([(b"o" * 16, store.capacity_bytes // LAYOUT.segment_bytes(1))], 600)
            assert not any(has(store, digest) for digest, _ in SEGMENTS)

        runner.meanwhile = lapse
        with pytest.raises(LeaseLapsed, match=r"ran out here.*30 s.*send the request again") as told:
            await draw(pair, runner, store, pair.ref())
        assert told.value.grpc_status == "UNAVAILABLE" and len(runner.began) == 1

    run(test)


def test_a_picture_that_can_never_fit_the_device_is_refused_before_anything_is_pulled() -> None:
    async def test(pair: Pair) -> None:
        store, ref = KvStore(LAYOUT, FINGERPRINT, 64 << 20), pair.ref()
        fill(pair.there)
        with pytest.raises(BagelError, match=r"takes \d+ tokens of K/V on the device, which holds 20 ") as told:
            await draw(pair, Runner(kv_tokens=20), store, ref)
        assert told.value.grpc_status == "INVALID_ARGUMENT"
        assert not any(has(store, digest) for digest, _ in SEGMENTS)

    run(test)


def test_a_lease_that_lapses_while_pages_come_fails_the_fetch() -> None:
    async def test(pair: Pair) -> None:
        clock = Clock()
        store = KvStore(LAYOUT, FINGERPRINT, 64 << 20, clock=clock)
        puller = KvPuller(store, {"thinker": pair.channel}, lease_ttl_s=TTL_S)

        def stop(data: bytes, count: int) -> bytes:
            if count == 2:
                clock.stand_still()
            return data

        pair.source.damage = stop
        ref = pair.ref()
        fill(pair.there)
        with pytest.raises(LeaseLapsed, match="ran out here"):
            async with puller.hold([ref]) as held:
                await held.fetch()
        async with puller.hold([pair.ref()]) as held:  # the next one works
            await held.fetch()
            held.check()
            clock.stand_still()
            with pytest.raises(LeaseLapsed):
                held.check()
        await puller.close()

    run(test)


def test_an_event_loop_that_stands_still_is_seen_by_the_renewal() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        failed: BagelError | None = None
        async with pair.puller.hold([ref]) as held:
            await held.fetch()
            await asyncio.sleep(0.5)
            held.check()
            time.sleep(0.5)
            await asyncio.sleep(0.2)  # the renewal finds that it is too late
            try:
                held.check()
            except LeaseLapsed as error:
                failed = error
        assert failed is not None
        await pair.settled()

    run(test, lease_ttl_s=0.3)
