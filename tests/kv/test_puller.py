"""K/V between two stores over real gRPC: exact, once, checked, and with nothing held when it goes wrong."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from bagel.errors import (
    ConfigError,
    ForeignContext,
    IncompleteContext,
    LeaseLapsed,
    StoreFull,
)
from bagel.kv.codec import decode_page
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.store import KvStore
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from tests.kv.pair import (
    FINGERPRINT,
    LAYOUT,
    OURS,
    PAGES,
    ROWS,
    SEGMENTS,
    Pair,
    check,
    fails,
    fill,
    flipped,
    has,
    layer_of,
    run,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_context_arrives_exactly(dtype: str) -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        await pair.fetch(ref)
        check(pair.here)
        await pair.settled()
        there, here = pair.there.stats(), pair.here.stats()
        assert there.sent_bytes == here.received_bytes == here.stored_bytes == there.computed_bytes
        assert there.sent_pages == here.received_pages == there.computed_pages
        assert (there.computed_segments, here.retried_pages) == (2, 0)

    run(test, KvLayout(3, 4, 64, dtype))


def test_a_flipped_byte_is_asked_for_once_more() -> None:
    async def test(pair: Pair) -> None:
        fill_later = pair.ref()
        fill(pair.there)
        pair.source.damage = flipped(2)
        await pair.fetch(fill_later)
        check(pair.here)
        assert pair.here.stats().retried_pages == 1
        await pair.settled()

    run(test)


def test_a_damaged_header_is_asked_for_once_more() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        for place in range(40):  # every field of the header
            pair.source.sent = 0
            pair.source.damage = (
                lambda data, count, at=place: (  # type: ignore[misc]
                    data[:at] + bytes((data[at] ^ 0x15,)) + data[at + 1 :] if count == 3 else data
                )
            )
            here = KvStore(LAYOUT, FINGERPRINT, 64 << 20)
            puller = KvPuller(here, {"thinker": pair.channel})
            async with puller.hold([pair.ref()]) as held:
                await held.fetch()
            check(here)
            await puller.close()
        pair.there.release([ref.lease_id])
        await pair.settled()

    run(test)


def test_a_page_damaged_twice_fails_the_request() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        pair.source.damage = flipped(0)
        await fails(pair, IncompleteContext, "segment", "layer", "checksum", "thinker", refs=[ref])
        assert pair.here.stats().stored_bytes == 0
        pair.source.damage = lambda data, count: data
        await pair.fetch(pair.ref())
        check(pair.here)
        await pair.settled()

    run(test)


def test_pages_arrive_while_the_rest_is_computed() -> None:
    async def test(pair: Pair) -> None:
        (digest, length), arrived = SEGMENTS[0], asyncio.Event()
        seen: list[tuple[bytes, int, int, int]] = []

        def on_page(*page: Any) -> None:
            seen.append(page)
            arrived.set()

        unsubscribe = pair.here.subscribe(on_page)
        fetch = asyncio.create_task(pair.fetch(pair.ref(SEGMENTS[0])))
        assert pair.there.claim(digest)
        for layer in range(LAYOUT.layers):
            await asyncio.to_thread(pair.there.write_layer, digest, layer, *layer_of(LAYOUT, digest, length, layer))
            while not has(pair.here, digest) or len(pair.here.ready_pages(digest)) < 2 * (layer + 1):
                arrived.clear()
                await arrived.wait()
            assert not fetch.done() and pair.there.is_complete(digest) == (layer == LAYOUT.layers - 1)
        await fetch
        check(pair.here, SEGMENTS[0])
        assert seen == [(digest, n, begin, end) for n in range(3) for begin, end in LAYOUT.page_ranges(length)]
        unsubscribe()
        await pair.settled()

    run(test)


def test_what_waits_comes_layer_by_layer_whichever_segment_it_is_of() -> None:
    """A first step computes with a layer once it has all of it; the last segment is computed last, and is short."""

    async def test(pair: Pair) -> None:
        order: list[int] = []
        pair.here.subscribe(lambda digest, layer, begin, end: order.append(layer))
        ref = pair.ref()
        fill(pair.there)
        await pair.fetch(ref)
        assert len(order) == PAGES and order == sorted(order)

    run(test)


def test_nothing_is_pulled_twice() -> None:
    async def test(pair: Pair) -> None:
        one, other = pair.ref(), pair.ref(SEGMENTS[0])
        both = asyncio.gather(pair.fetch(one, other), pair.fetch(pair.ref()))
        await asyncio.sleep(0.05)
        fill(pair.there)
        await both
        await pair.fetch(pair.ref())
        third = (b"c" * 16, 3)
        ref = pair.ref(*SEGMENTS, third)
        fill(pair.there, third)
        await pair.fetch(ref)
        check(pair.here, *SEGMENTS, third)
        assert pair.there.stats().sent_bytes == pair.there.stats().computed_bytes == pair.here.stats().stored_bytes
        assert pair.here.stats().reused_segments == 6
        await pair.settled()

    run(test)


def test_another_request_goes_on_when_the_puller_is_cancelled() -> None:
    async def test(pair: Pair) -> None:
        first, other = pair.ref(), pair.ref()
        digest, length = SEGMENTS[0]
        assert pair.there.claim(digest)
        pair.there.write_layer(digest, 0, *layer_of(LAYOUT, digest, length, 0))
        began = asyncio.create_task(pair.fetch(first))
        while pair.here.stats().received_pages < 2:
            await asyncio.sleep(0.01)
        waits = asyncio.create_task(pair.fetch(other))
        await asyncio.sleep(0.05)
        began.cancel()
        with suppress(asyncio.CancelledError):
            await began
        for layer in (1, 2):
            pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
        fill(pair.there, SEGMENTS[1])
        await waits
        check(pair.here)
        assert pair.there.stats().sent_bytes == pair.here.stats().stored_bytes
        await pair.settled()

    run(test)


def test_a_context_waits_for_room_in_the_store() -> None:
    async def test(pair: Pair) -> None:
        puller = KvPuller(
            KvStore(LAYOUT, FINGERPRINT, LAYOUT.segment_bytes(ROWS + 5), flag="--kv-cache-bytes"),
            {"thinker": pair.channel},
            room_wait_s=0.2,
        )

        async def patiently(ref: kv_pb2.ContextRef) -> None:
            async with puller.hold([ref], room_wait_s=math.inf) as held:
                await held.fetch()

        ref, other = pair.ref(), pair.ref((b"c" * 16, ROWS))
        fill(pair.there, *SEGMENTS, (b"c" * 16, ROWS))
        async with puller.hold([ref]) as held:
            with pytest.raises(StoreFull, match="--kv-cache-bytes"):
                async with puller.hold([other]):
                    pass
            waits = asyncio.create_task(patiently(pair.ref((b"c" * 16, ROWS))))  # of a request that has begun
            await held.fetch()
            await asyncio.sleep(0.5)
            assert not waits.done()
        await waits
        check(puller.store, (b"c" * 16, ROWS))
        await puller.close()
        await pair.settled()

    run(test)


def test_what_does_not_fit_is_refused_with_its_name() -> None:
    async def test(pair: Pair) -> None:
        fill_later = pair.ref()
        fill(pair.there)
        pair.there.release([fill_later.lease_id])
        refs = {
            "unknown": pair.ref(source="elsewhere"),
            "foreign": pair.ref(fingerprint=b"other"),
            "lapsed": pair.ref(lease_id="gone"),
        }
        with pytest.raises(ConfigError, match="elsewhere"):
            await pair.fetch(refs["unknown"])
        with pytest.raises(ForeignContext, match=b"other".hex()):
            await pair.fetch(refs["foreign"])
        with pytest.raises(LeaseLapsed, match="gone"):
            await pair.fetch(refs["lapsed"])
        stats = pair.here.stats()
        assert (stats.leases, stats.pulls, stats.stored_bytes) == (0, 0, 0)
        await pair.puller.close()
        assert pair.there.stats().leases == 2  # the foreign one's was given back

    run(test)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"fingerprint": b"other"}, grpc.StatusCode.FAILED_PRECONDITION, (b"other".hex(), FINGERPRINT.hex())),
        ({"lease_id": "gone"}, grpc.StatusCode.UNAVAILABLE, ("gone",)),
        ({"digests": [b"?" * 16]}, grpc.StatusCode.NOT_FOUND, ((b"?" * 16).hex(),)),
        ({"head_end": 9}, grpc.StatusCode.INVALID_ARGUMENT, ("9",)),
        ({"layer_end": 9}, grpc.StatusCode.INVALID_ARGUMENT, ("9",)),
    ],
)
def test_a_source_refuses(change: dict[str, Any], code: grpc.StatusCode, words: tuple[str, ...]) -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fields = {"digests": [SEGMENTS[0][0]], "lease_id": ref.lease_id, **OURS, **change}
        stub = KvBlocksServiceStub(pair.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Pull(kv_pb2.PullRequest(**fields)).read()
        assert caught.value.code() == code
        assert all(word in str(caught.value.details()) for word in words)

    run(test)


def test_a_lease_that_lapses_while_a_pull_waits_ends_it() -> None:
    async def test(pair: Pair) -> None:
        lease = pair.there.lease(SEGMENTS, 0.2)
        request = kv_pb2.PullRequest(digests=[SEGMENTS[0][0]], lease_id=lease, **OURS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await KvBlocksServiceStub(pair.channel).Pull(request).read()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await pair.settled()
        assert pair.there.stats().stored_bytes == 0

    run(test)


def test_the_source_lease_is_renewed_while_its_context_is_held() -> None:
    async def test(pair: Pair) -> None:
        async with pair.puller.hold([pair.ref(ttl_s=0.3)]) as held:
            await asyncio.sleep(0.8)
            fill(pair.there)
            await held.fetch()
        check(pair.here)
        await pair.settled()

    run(test, lease_ttl_s=0.3)


def test_a_rank_pulls_only_its_heads() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        await pair.fetch(ref)
        for digest, length in SEGMENTS:
            k, v = pair.here.load(digest)
            for layer in range(LAYOUT.layers):
                whole = layer_of(LAYOUT, digest, length, layer)
                assert torch.equal(k[layer], whole[0][:, 1:3]) and torch.equal(v[layer], whole[1][:, 1:3])
        assert pair.there.stats().sent_bytes == pair.there.stats().computed_bytes // 2
        await pair.settled()

    run(test, here=KvLayout(3, 2, 64, "bfloat16", page_heads=4), head_begin=1)


def test_a_stock_client_reads_pages_and_stats() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        stub = KvBlocksServiceStub(pair.channel)
        request = kv_pb2.PullRequest(
            digests=[SEGMENTS[1][0]], lease_id=ref.lease_id, layer_begin=1, layer_end=2, **OURS
        )
        pages = [page async for page in stub.Pull(request)]
        k, v = layer_of(LAYOUT, *SEGMENTS[1], 1)
        assert [page.layer for page in pages] == [1]
        assert pages[0].payload == torch.stack((k, v)).view(torch.uint8).numpy().tobytes()
        page = decode_page(pages[0].SerializeToString())
        assert page is not None and page.payload == pages[0].payload
        stats = await stub.GetStats(kv_pb2.GetStatsRequest())
        assert (stats.sent_pages, stats.computed_segments, stats.leases) == (1, 2, 1)
        await stub.Release(kv_pb2.ReleaseRequest(lease_ids=[ref.lease_id]))
        renewed = await stub.Renew(kv_pb2.RenewRequest(lease_ids=[ref.lease_id]))
        assert list(renewed.lapsed_lease_ids) == [ref.lease_id]
        await pair.settled()

    run(test)


def test_random_cancels_leave_the_others_whole_and_nothing_held() -> None:
    async def test(pair: Pair) -> None:
        rng = Random(0)
        segments = [(bytes((letter,)) * 16, rng.choice((3, ROWS))) for letter in b"abcdef"]
        tasks = []
        for _ in range(60):
            chosen = rng.sample(segments, rng.randint(1, 4))
            cancel_after = rng.choice((None, 0.0, 0.01, 0.03))
            ref = pair.ref(*chosen)
            tasks.append(asyncio.create_task(_fetch_checked(pair, ref, chosen, cancel_after)))
            if rng.random() < 0.5:
                await asyncio.sleep(0.005)
            for digest, length in chosen:  # the engine computes what nobody has
                if has(pair.there, digest) and pair.there.claim(digest):
                    for layer in range(LAYOUT.layers):
                        pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
        ended = await asyncio.gather(*tasks)
        assert {True, False} == set(ended)
        await pair.settled()

    run(test)


async def _fetch_checked(
    pair: Pair, ref: kv_pb2.ContextRef, segments: list[tuple[bytes, int]], cancel_after: float | None
) -> bool:
    """Whether a fetch came to its end, exactly, before it was cancelled."""
    try:
        async with asyncio.timeout(cancel_after), pair.puller.hold([ref]) as held:
            await held.fetch()
            check(pair.here, *segments)
            return True
    except TimeoutError:
        assert cancel_after is not None
        return False
