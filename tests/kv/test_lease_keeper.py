"""One keeper of leases for the gateway, the Thinker and the puller, over a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bagel.kv.lease_keeper import LeaseKeeper, LocalLessor
from bagel.kv.pages import KvLayout
from bagel.kv.store import KvStore

LAYOUT = KvLayout(2, 2, 8, "float32")
SEGMENTS = [(b"a" * 16, 4)]
TTL_S = 0.3


class Lessor(LocalLessor):
    """A store's, which counts how often it is asked."""

    asked = 0

    async def renew(self, lease_ids: Sequence[str]) -> Sequence[str]:
        self.asked += 1
        return await super().renew(lease_ids)


async def kept(keeper: LeaseKeeper, seconds: float) -> None:
    renewing = asyncio.create_task(keeper.renew())
    await asyncio.sleep(seconds)
    renewing.cancel()


def store() -> KvStore:
    return KvStore(LAYOUT, b"fingerprint", 1 << 20)


def test_a_lease_outlives_its_time_until_it_is_released() -> None:
    here = store()
    keeper = LeaseKeeper(LocalLessor(here))
    keeper.add(here.lease(SEGMENTS, TTL_S), TTL_S)
    asyncio.run(kept(keeper, 3 * TTL_S))
    assert here.stats().leases == 1
    keeper.release()
    assert here.stats().leases == 0


def test_a_lease_that_ran_out_is_not_asked_for_again() -> None:
    here = store()
    lessor = Lessor(here)
    keeper = LeaseKeeper(lessor)
    keeper.add("gone", TTL_S)
    asyncio.run(kept(keeper, 3 * TTL_S))
    assert lessor.asked == 1


def test_what_is_handed_over_is_neither_renewed_nor_released() -> None:
    here = store()
    lessor = Lessor(here)
    keeper = LeaseKeeper(lessor)
    name = keeper.new()
    here.lease(SEGMENTS, 60, name)
    keeper.hand_over()
    keeper.hold(name, TTL_S)  # its answer comes late
    keeper.release()
    asyncio.run(kept(keeper, TTL_S))
    assert lessor.asked == 0 and here.stats().leases == 1


def test_one_lease_of_several_is_released_once() -> None:
    here = store()
    keeper = LeaseKeeper(LocalLessor(here))
    one, other = (here.lease(SEGMENTS, 60) for _ in range(2))
    for lease in (one, other):
        keeper.add(lease, 60)
    keeper.release(one)
    keeper.release("another's")
    assert here.renew([one, other]) == [one]
