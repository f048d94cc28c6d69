"""Sources of K/V that die, fail, fall silent or start anew while they are pulled from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from bagel.errors import (
    IncompleteContext,
    KvTimeout,
    Loading,
    NotFinite,
    SourceUnavailable,
)
from bagel.kv.codec import decode_page
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from tests.kv.pair import LAYOUT, OURS, SEGMENTS, Pair, check, fails, fill, flipped, layer_of, paired, run, until


def test_a_source_that_dies_fails_the_request() -> None:
    async def test(pair: Pair) -> None:
        fetch = asyncio.create_task(pair.fetch(pair.ref()))
        digest, length = SEGMENTS[0]
        assert pair.there.claim(digest)
        pair.there.write_layer(digest, 0, *layer_of(LAYOUT, digest, length, 0))
        while pair.here.stats().received_pages < 2:
            await asyncio.sleep(0.01)
        await pair.server.stop(None)
        with pytest.raises(SourceUnavailable, match="thinker"):
            await fetch
        stats = pair.here.stats()
        assert (stats.leases, stats.pulls, stats.stored_bytes) == (0, 0, 0)

    run(test)


def test_who_asks_late_hears_why_a_segment_of_another_request_failed() -> None:
    async def test(pair: Pair) -> None:
        overflow, served = asyncio.Event(), pair.source._pages

        async def pages(request: kv_pb2.PullRequest) -> AsyncGenerator[bytes, None]:
            if SEGMENTS[0][0] in request.digests:
                await overflow.wait()
                raise NotFinite("overflow")
            async for page in served(request):
                yield page

        pair.source._pages = pages  # type: ignore[method-assign]
        first = asyncio.create_task(pair.fetch(pair.ref(SEGMENTS[0])))
        await until(lambda: pair.here.stats().pulls == 1)
        late = asyncio.create_task(pair.fetch(pair.ref()))  # it pulls the second segment, and waits for the first then
        await until(lambda: pair.here.stats().pulls == 2)
        overflow.set()
        with pytest.raises(NotFinite):
            await first
        fill(pair.there, SEGMENTS[1])
        with pytest.raises(NotFinite, match="overflow"):
            await late
        await pair.settled()

    run(test)


@pytest.mark.parametrize("how", ["dead", "silent", "damaged"])
def test_who_has_another_source_goes_on_when_one_fails(how: str) -> None:
    """Both have the first segment, as all plans have the system prompt."""

    async def test(pair: Pair) -> None:
        digest, length = SEGMENTS[0]
        async with paired(LAYOUT) as other:
            pair.puller.sources["healthy"] = other.puller.sources["thinker"]
            refs = (pair.ref(), pair.ref(SEGMENTS[0]))
            if how != "damaged":
                assert pair.there.claim(digest)
                pair.there.write_layer(digest, 0, *layer_of(LAYOUT, digest, length, 0))
            fetches = [asyncio.create_task(pair.fetch(ref)) for ref in refs]
            await until(lambda: pair.here.stats().pulls == 1 and pair.here.stats().received_pages in (0, 2))
            healthy = asyncio.create_task(pair.fetch(other.ref(SEGMENTS[0], source="healthy")))
            await asyncio.sleep(0.1)
            fill(other.there, SEGMENTS[0])
            assert not healthy.done()
            if how == "dead":
                await pair.server.stop(None)
            elif how == "damaged":
                pair.source.damage = flipped(0)
                fill(pair.there, *SEGMENTS)
            else:
                pair.source.silent_after = pair.source.sent
                for layer in (1, 2):
                    pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
            kinds = {"dead": SourceUnavailable, "silent": KvTimeout, "damaged": IncompleteContext}
            for failed in await asyncio.gather(*fetches, return_exceptions=True):
                assert isinstance(failed, kinds[how])
            await healthy
            check(pair.here, SEGMENTS[0])
            await pair.puller.close()

    run(test, page_timeout_s=1.0)


def test_a_source_that_was_started_again_and_loads_is_no_loading_of_ours() -> None:
    async def test(pair: Pair) -> None:
        async def pages(request: kv_pb2.PullRequest) -> AsyncGenerator[bytes, None]:
            for page in list[bytes]():
                yield page
            raise Loading("the service is loading its model")

        pair.source._pages = pages  # type: ignore[method-assign]
        with pytest.raises(SourceUnavailable, match=r"thinker was started again .* loading its model"):
            await pair.fetch(pair.ref())
        await pair.settled()

    run(test)


def test_a_silent_source_fails_the_request_in_its_time() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        pair.source.silent_after = 2
        await fails(pair, KvTimeout, "thinker", "0.3 s", refs=[ref])
        pair.source.silent_after = None
        await pair.fetch(pair.ref())
        check(pair.here)

    run(test, page_timeout_s=0.3)


def test_a_long_queue_is_no_silence() -> None:
    async def test(pair: Pair) -> None:
        (digest, length), pages = SEGMENTS[1], LAYOUT.layers
        fetch = asyncio.create_task(pair.fetch(pair.ref(SEGMENTS[1])))
        await asyncio.sleep(1.0)  # queued
        assert pair.there.claim(digest)
        for layer in range(pages):  # computed slowly
            pair.there.write_layer(digest, layer, *layer_of(LAYOUT, digest, length, layer))
            await asyncio.sleep(0.5)
        await fetch
        check(pair.here, SEGMENTS[1])
        there, here = pair.there.stats(), pair.here.stats()
        assert (there.sent_pages, here.received_pages, here.retried_pages) == (pages, pages, 0)
        await pair.settled()

    run(test, page_timeout_s=0.3)


def test_a_source_that_falls_silent_in_its_queue_fails_the_request_in_its_time() -> None:
    async def test(pair: Pair) -> None:
        pair.source.silent_after = 3  # signs of life
        await fails(pair, KvTimeout, "thinker", "0.3 s")
        assert pair.source.sent == 3

    run(test, page_timeout_s=0.3)


async def reading(call: Any) -> AsyncIterator[kv_pb2.PullResponse]:
    """The rest of a stream."""
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


def test_only_who_asks_for_signs_of_life_gets_them() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref(SEGMENTS[1])
        request = kv_pb2.PullRequest(digests=[SEGMENTS[1][0]], lease_id=ref.lease_id, **OURS)
        stub, quiet = KvBlocksServiceStub(pair.channel), kv_pb2.PullRequest()
        quiet.CopyFrom(request)
        request.waiting_seconds = 1e-9  # no more often than the source likes
        told, silent = stub.Pull(request), stub.Pull(quiet)
        for _ in range(3):
            life = await told.read()
            assert isinstance(life, kv_pb2.PullResponse)
            assert life == kv_pb2.PullResponse(waiting=kv_pb2.Waiting(pages=LAYOUT.layers))
            assert decode_page(life.SerializeToString()) is None
        fill(pair.there, SEGMENTS[1])
        assert [page.layer async for page in silent] == list(range(LAYOUT.layers))
        rest = [page async for page in reading(told)]
        assert [page.layer for page in rest if not page.HasField("waiting")] == list(range(LAYOUT.layers))
        assert pair.source.sent < 100
        pair.there.release([ref.lease_id])
        await pair.settled()

    run(test)
