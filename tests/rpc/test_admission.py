"""Places that are bounded, and requests that wait for them: one rule for the gateway and the stages."""

from __future__ import annotations

import asyncio

import pytest

from bagel.errors import Busy, Draining
from bagel.rpc.admission import Admission


def test_more_than_may_wait_are_refused_at_once() -> None:
    async def run() -> None:
        admission = Admission("the gateway", 1, 60.0, settings="--max-requests", max_waiting=1, retry_after_s=2.0)
        async with admission.admit() as waited_s:
            assert waited_s == 0
            other = asyncio.create_task(_placed(admission))
            begun = asyncio.create_task(_placed(admission, begun=True))
            await asyncio.sleep(0.05)
            assert (admission.under_way, admission.waiting) == (1, 2)
            with pytest.raises(
                Busy, match=r"serves 1 requests, its limit, and 1 more wait .* raise --max-requests"
            ) as busy:
                await _placed(admission)
            assert busy.value.retry_after_s == 2.0
        assert await other > 0 and await begun > 0
        assert admission.under_way == admission.waiting == 0

    asyncio.run(run())


def test_a_queue_that_lasts_takes_nobody_more() -> None:
    async def run() -> None:
        admission = Admission("the gateway", 1, 60.0, patience=2.0)
        async with admission.admit():
            await asyncio.sleep(0.1)  # what a request takes
        async with admission.admit():
            burst = [asyncio.create_task(_placed(admission)) for _ in range(3)]
            await asyncio.sleep(0.4)
            with pytest.raises(Busy, match=r"others have waited without a pause for 0\.\d+ s"):
                await _placed(admission)
        await asyncio.gather(*burst)
        async with admission.admit():
            later = asyncio.create_task(_placed(admission))
            await asyncio.sleep(0.05)
            assert admission.waiting == 1  # the queue was empty meanwhile
        await later

    asyncio.run(run())


def test_places_follow_a_limit_that_changes() -> None:
    async def run() -> None:
        limit, order = 1, list[int]()
        admission = Admission("the gateway", lambda: limit, 60.0)
        go = asyncio.Event()

        async def placed(number: int) -> None:
            async with admission.admit():
                order.append(number)
                await go.wait()

        tasks = [asyncio.create_task(placed(number)) for number in range(5)]
        await asyncio.sleep(0.05)
        assert order == [0]
        limit = 3
        tasks[1].cancel()  # one that leaves holds nobody up
        await asyncio.sleep(0.05)
        admission.refill()
        await asyncio.sleep(0.05)
        assert order == [0, 2, 3] and admission.waiting == 1
        limit = 1
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 2, 3, 4] and admission.under_way == admission.waiting == 0

    asyncio.run(run())


def test_a_place_is_not_lost_with_one_that_leaves_as_it_gets_it() -> None:
    async def run() -> None:
        admission = Admission("the gateway", 1, 60.0)
        async with admission.admit():
            leaving = asyncio.create_task(_placed(admission))
            await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert await _placed(admission) == 0

    asyncio.run(run())


def test_a_service_that_drains_serves_what_it_accepted() -> None:
    async def run() -> None:
        draining = asyncio.Event()
        admission = Admission("dit-0", 1, 60.0, draining=draining)
        async with admission.admit():
            new = asyncio.create_task(_placed(admission))
            begun = asyncio.create_task(_placed(admission, begun=True))
            await asyncio.sleep(0.05)
            draining.set()
            with pytest.raises(Draining):
                await _placed(admission)
        with pytest.raises(Draining, match="dit-0 is shutting down"):
            await new
        await begun
        assert admission.under_way == 0

    asyncio.run(run())


async def _placed(admission: Admission, *, begun: bool = False) -> float:
    async with admission.admit(begun=begun) as waited_s:
        return waited_s
