"""How many requests the gateway lets under way by default: as many as its stages say that they have places for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from PIL import Image

from bagel.errors import Busy
from bagel.events import Result
from bagel_gateway import places
from tests.gateway.test_service import hold, release, through, until
from tests.gateway_stages import Deployment

PICTURE: dict[str, Any] = {"height": 16, "width": 16}
PATIENT_S = 30.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of --batch-timeout, so that on a busy machine none that waits is refused meanwhile."""
    monkeypatch.setattr(places, "BATCH_TIMEOUT_S", PATIENT_S)


def ask(at: Deployment, count: int) -> list[asyncio.Task[Result]]:
    """So many pictures, each under way or waiting once this has yielded often enough."""
    return [asyncio.create_task(at.client.generate("a red cube", seed=seed, **PICTURE)) for seed in range(count)]


async def tell(at: Deployment, *counts: int) -> None:
    """Have the stages say that they have so many places, and wait until the gateway has heard it."""
    for thinker, count in zip(at.thinkers, counts, strict=False):
        thinker.places = count
    for dit, count in zip(at.dits, counts[len(at.thinkers) :], strict=True):
        dit.places = count
    backends = (*at.gateway.backends.thinkers, *at.gateway.backends.dits)
    await until(lambda: tuple(each.places for each in backends) == counts)


def test_as_many_are_under_way_as_the_stages_have_places_and_as_many_wait() -> None:
    async def work(at: Deployment) -> None:
        await tell(at, 2, 3)
        hold(at)
        pictures, gateway = ask(at, 10), at.gateway.admission
        await until(lambda: (gateway.under_way, gateway.waiting) == (5, 5))
        with pytest.raises(Busy, match=r"serves 5 requests, its limit, and 5 more wait already; .* --max-num-seqs"):
            await at.client.generate("one too many", **PICTURE)
        # The queue before the DiT keeps no text from the Thinker.
        at.thinkers[0].go.set()
        assert (await at.client.generate("why?", modality="text2text", max_tokens=2)).text == "so be it"
        release(at)
        assert all(each.image for each in await asyncio.gather(*pictures))

    through(work, batch_timeout_s=PATIENT_S)


@pytest.mark.parametrize("topology", ["bagel", "bagel_single_stage"])
def test_images_leave_places_to_requests_without_any(topology: str) -> None:
    async def work(at: Deployment) -> None:
        await tell(at, *[1] * len(at.hosts))
        hold(at)
        image, gateway = Image.new("RGB", (32, 32)), at.gateway.admission
        reading = [
            asyncio.create_task(at.client.generate("what is it?", modality="img2text", image=image, max_tokens=2))
            for _ in range(4)
        ]
        await until(lambda: (gateway.under_way, gateway.waiting) == (2, 2))
        with pytest.raises(Busy, match="2 more wait already"):
            await at.client.generate("what is it?", modality="img2text", image=image, max_tokens=2)
        ask(at, 1)
        await until(lambda: (gateway.under_way, gateway.waiting) == (3, 2))
        release(at)
        await asyncio.gather(*reading, return_exceptions=True)

    through(work, topology, batch_timeout_s=PATIENT_S)


def test_places_follow_replicas_that_come_and_go() -> None:
    async def work(at: Deployment) -> None:
        await tell(at, 1, 5, 4)
        first, second = at.gateway.backends.dits
        await at.hosts[-1].not_ready()
        await until(lambda: second.model is None)
        hold(at)
        pictures, gateway = ask(at, 10), at.gateway.admission
        await until(lambda: (gateway.under_way, gateway.waiting) == (6, 4))
        await at.hosts[-1].ready()
        # Those that wait get the places of the one that came, though none of the others has ended.
        await until(lambda: (gateway.under_way, gateway.waiting) == (10, 0))
        release(at)
        await asyncio.gather(*pictures)
        # While all are gone requests wait for them, as many as they had places for.
        await at.hosts[-1].not_ready()
        await at.hosts[-2].not_ready()
        await until(lambda: first.model is second.model is None)
        pictures = ask(at, 10)
        await until(lambda: gateway.under_way == 10)
        await at.hosts[-1].ready()
        await asyncio.gather(*pictures)

    through(work, dits=(b"k", b"k"), batch_timeout_s=PATIENT_S)


@pytest.mark.parametrize(("wait_s", "waiting"), [(PATIENT_S, 5), (2 * PATIENT_S, 10)])
def test_who_lets_requests_wait_longer_lets_more_of_them_wait(wait_s: float, waiting: int) -> None:
    async def work(at: Deployment) -> None:
        await tell(at, 2, 3)
        hold(at)
        pictures, gateway = ask(at, 5 + waiting), at.gateway.admission
        await until(lambda: (gateway.under_way, gateway.waiting) == (5, waiting))
        with pytest.raises(Busy, match=f"{waiting} more wait already"):
            await at.client.generate("one too many", **PICTURE)
        release(at)
        await asyncio.gather(*pictures)

    through(work, batch_timeout_s=wait_s)


@pytest.mark.parametrize("topology", ["bagel", "bagel_single_stage"])
def test_few_places_let_a_few_requests_under_way(topology: str) -> None:
    async def work(at: Deployment) -> None:
        await tell(at, *[1] * len(at.hosts))
        hold(at)
        pictures, gateway = ask(at, 8), at.gateway.admission
        await until(lambda: (gateway.under_way, gateway.waiting) == (4, 4))
        release(at)
        await asyncio.gather(*pictures)

    through(work, topology, batch_timeout_s=PATIENT_S)


def test_a_number_holds_as_it_is_set_for_texts_and_pictures_together() -> None:
    async def work(at: Deployment) -> None:
        hold(at)
        pictures, gateway = ask(at, 4), at.gateway.admission
        await until(lambda: (gateway.under_way, gateway.waiting) == (2, 2))
        with pytest.raises(Busy, match=r"2 more wait already; .* raise --max-requests or --batch-timeout"):
            await at.client.generate("why?", modality="text2text", max_tokens=2)
        release(at)
        await asyncio.gather(*pictures)

    through(work, max_requests=2, batch_timeout_s=PATIENT_S)
