"""K/V that other hosts fetch too: the leases of their sources are kept for all, by one."""

from __future__ import annotations

import asyncio

import pytest
import torch

from bagel.errors import SourceUnavailable
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.store import KvStore
from tests.kv.pair import FINGERPRINT, LAYOUT, SEGMENTS, Pair, fill, run

HALF = KvLayout(LAYOUT.layers, LAYOUT.kv_heads // 2, LAYOUT.head_dim, LAYOUT.dtype, page_heads=LAYOUT.kv_heads)


def second_half(pair: Pair) -> KvPuller:
    """What pulls the second half of the heads on another host, and leaves the sources' leases to the first."""
    store = KvStore(HALF, FINGERPRINT, 64 << 20)
    return KvPuller(store, {"thinker": pair.channel}, head_begin=LAYOUT.kv_heads // 2, keeps_sources=False)


@pytest.mark.parametrize("here", [True, False])
def test_a_source_keeps_what_another_host_still_fetches(here: bool) -> None:
    async def test(pair: Pair) -> None:
        ref, there = pair.ref(ttl_s=1.0), second_half(pair)
        (lease,) = pair.there._ledger.leases.values()
        ends = lease.deadline
        fill(pair.there)
        may_fetch = asyncio.Event()
        async with pair.puller.hold([ref], here=here) as held, there.hold([ref]) as other:

            async def late() -> None:
                await may_fetch.wait()
                await other.fetch()

            held.elsewhere.append(late)
            fetching = asyncio.create_task(held.fetch())
            while here and not all(pair.here.is_complete(digest) for digest, _ in SEGMENTS):
                await asyncio.sleep(0.01)
            while lease.deadline < ends + lease.ttl_s / 2:  # until it is renewed past its end, and some more
                assert pair.there.stats().leases == 1
                await asyncio.sleep(0.01)
            assert pair.there.stats().leases == 1
            may_fetch.set()
            await fetching
            assert all(pair.here.is_complete(digest) == here for digest, _ in SEGMENTS)
            for digest, _ in SEGMENTS:
                for ours, theirs in zip(there.store.load(digest), pair.there.load(digest), strict=True):
                    assert torch.equal(ours, theirs[:, :, LAYOUT.kv_heads // 2 :])
        assert not there.store.stats().leases
        await pair.settled()

    run(test)


def test_a_fetch_that_fails_elsewhere_fails_all() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)

        async def broken() -> None:
            raise SourceUnavailable("the other host cannot reach it")

        async with pair.puller.hold([ref]) as held:
            held.elsewhere.append(broken)
            with pytest.raises(SourceUnavailable, match="other host"):
                await held.fetch()
        await pair.settled()

    run(test)
