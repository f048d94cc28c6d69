"""Batches and results that come together: what was begun waits for its place, what is refused has not begun."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bagel.client import AsyncClient, Client
from bagel.client.busy_retry import BusyRetry
from bagel.errors import Busy, InvalidRequest
from bagel.events import Accepted, ServiceEvent
from bagel.rpc.admission import Admission
from tests.gateway.test_service import hold, red_cube, release, through, until
from tests.gateway_stages import Deployment
from tests.rest.test_front import post
from tests.shared import SOCKETS, connections

WAIT_S = 0.2


def refuse() -> None:
    raise Busy("full", 1.0)


def places(at: Deployment, count: int = 1) -> Admission:
    """Give the fake DiT so many places, each of whose pictures takes longer than others wait for one."""
    admission = Admission("dit-0", count, WAIT_S)
    at.dits[0].admission = admission
    at.dits[0].seconds = 1.5 * WAIT_S
    return admission


@pytest.mark.slow
def test_a_batch_waits_for_its_own_at_the_dit() -> None:
    async def work(at: Deployment) -> None:
        places(at)
        batch: list[Any] = ["a red cube", *({"prompt": "a red cube", "seed": n} for n in range(4))]
        results = await at.client.generate_many(batch)
        assert [result.seed for result in results[1:]] == [0, 1, 2, 3]
        with ThreadPoolExecutor(1) as thread, Client(at.target) as client:
            again = await asyncio.wrap_future(thread.submit(client.generate_many, batch))
        assert [result.seed for result in again[1:]] == [0, 1, 2, 3]
        await at.settled()

    through(work)


@pytest.mark.skipif(not SOCKETS[0].exists(), reason="no /proc here")
def test_a_batch_that_waited_leaves_no_connection() -> None:
    async def batch(target: str) -> None:
        async with AsyncClient(target) as client:
            await client.generate_many(["a red cube", "a blue cube", "a green cube"])

    async def work(at: Deployment) -> None:
        places(at)
        before = connections(at.target)
        await batch(at.target)
        async with asyncio.timeout(10):
            while connections(at.target) > before:
                await asyncio.sleep(0.05)

    gc.disable()  # which would close it, some time or other
    try:
        through(work)
    finally:
        gc.enable()


def test_what_is_refused_was_not_accepted() -> None:
    async def work(at: Deployment) -> None:
        places(at)
        hold(at)
        at.thinkers[0].go.set()
        first = asyncio.create_task(at.client.generate("a red cube"))
        await until(lambda: at.dits[0].admission.under_way == 1)
        heard: list[ServiceEvent] = []
        with pytest.raises(Busy, match="dit-0 is busy"):
            await at.client.generate("another", on_event=heard.append)
        assert not heard
        release(at)
        await first

    through(work)


def test_a_text_that_was_written_waits_for_its_picture() -> None:
    async def work(at: Deployment) -> None:
        admission = places(at)
        heard: list[ServiceEvent] = []
        async with admission.admit():  # another's picture, for longer than a new request would wait
            thinking = asyncio.create_task(at.client.generate("a red cube", think=True, on_event=heard.append))
            await until(lambda: admission.waiting == 1)
            await asyncio.sleep(3 * WAIT_S)
            assert isinstance(heard[0], Accepted) and not thinking.done()
        assert (await thinking).image is not None

    through(work)


@pytest.mark.parametrize("topology", ["bagel", "bagel_single_stage"])
def test_results_of_one_call_give_their_places_back(topology: str) -> None:
    """Two calls of three pictures at two places: more than wait for a place at once, and longer than one waits."""

    async def work(at: Deployment) -> None:
        admission = places(at, 2)
        body = {"prompt": "a red cube", "n": 3, "seed": 5, "size": "16x16"}
        answers = await asyncio.gather(*(post(at, "/v1/images/generations", body) for _ in range(2)))
        assert [[each["seed"] for each in answer["data"]] for _, answer in answers] == [[5, 6, 7]] * 2
        for each in (admission, at.gateway.admission):
            assert each.under_way == each.waiting == 0

    through(work, topology, max_requests=2, batch_timeout_s=WAIT_S, http="127.0.0.1:0")


def test_what_has_begun_waits_for_a_place_in_its_turn() -> None:
    async def work() -> None:
        admission, order = Admission("dit-0", 1, 0.05), list[str]()

        async def draw(name: str) -> None:
            async with admission.admit(begun=True):
                order.append(name)

        async with admission.admit():
            drawing = [asyncio.create_task(draw(name)) for name in ("one", "two")]
            with pytest.raises(Busy, match="dit-0 is busy"):
                async with admission.admit():
                    pass
            await asyncio.sleep(0.1)
            assert not order and admission.waiting == 2
        await asyncio.gather(*drawing)
        assert order == ["one", "two"] and admission.under_way == admission.waiting == 0

    asyncio.run(work())


def test_of_a_batch_that_nobody_of_it_serves_the_first_refusal_is_told() -> None:
    async def work() -> None:
        together = BusyRetry()
        with pytest.raises(Busy), together.attempt():
            refuse()
        with together.attempt() as one:
            one.begun = True
            with together.attempt() as other:
                refuse()
        assert other.refused is not None
        soon = Busy("full", 0.3)
        turns = [asyncio.create_task(together.turn(soon, left_s)) for left_s in (None, None, 0.05)]
        await asyncio.sleep(0.15)
        assert [turn.done() for turn in turns] == [False, False, True]
        with together.attempt() as one:
            one.begun = True
        await asyncio.sleep(0.01)
        assert [turn.done() for turn in turns] == [True, False, True]
        await turns[1]

    asyncio.run(work())


def test_one_that_is_refused_as_its_last_companion_ends_is_tried_again() -> None:
    together = BusyRetry()
    with together.attempt() as late:
        with together.attempt() as one:
            one.begun = True
        refuse()
    assert late.refused is not None


@pytest.mark.parametrize("timeout", [math.nan, -1, -math.inf, True, "5", 1 + 2j])
def test_a_deadline_that_is_none_is_refused(timeout: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=r"timeout is .* seconds") as wrong:
        client.generate("a red cube", timeout=timeout)
    assert wrong.value.field == "timeout"
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="timeout"):
        client.describe(timeout)


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 10**400, 86_400 * 365 * 5_000, 86_400 * 365 * 9])
def test_a_deadline_beyond_all_bounds_is_none(timeout: float) -> None:
    async def work(at: Deployment) -> None:
        assert (await at.client.generate("a red cube", timeout=timeout)).image is not None
        assert (await at.client.describe(timeout)).pipeline == "bagel"
        with ThreadPoolExecutor(1) as thread, Client(at.target) as client:
            many = thread.submit(client.generate_many, [{"prompt": "a red cube", "timeout": timeout}])
            assert (await asyncio.wrap_future(many))[0].image is not None

    through(work)


@pytest.mark.parametrize("prompt", [None, 5, b"a cat", {"prompt": "a cat"}, [None], 1.5])
def test_what_is_no_prompt_is_told(prompt: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=r"prompt is .*must be a text") as wrong:
        client.generate(prompt)
    assert wrong.value.field == "prompt"


@pytest.mark.parametrize("requests", [None, "a cat", b"a cat", {"prompt": "a cat"}, [None], [5], [["a cat"]]])
def test_what_is_no_list_of_requests_is_told(requests: Any) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="request"):
        client.generate_many(requests)

    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(InvalidRequest, match="request"):
                await client.generate_many(requests)

    asyncio.run(ask())


async def ask_with(at: Deployment, deadline: str) -> bytes:
    """All that the gateway sends in two seconds on a connection that asks with a deadline as it goes over the wire."""
    path, frames = "/bagel.v1.GatewayService/Generate", b""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc", "grpc-timeout": deadline}
    head = b"".join(b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in fields.items())
    message = red_cube().SerializeToString()
    body = b"\0" + len(message).to_bytes(4, "big") + message
    for kind, flags, stream, payload in ((4, 0, 0, b""), (1, 4, 1, head), (0, 1, 1, body)):
        frames += len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    reader, writer = await asyncio.open_connection(*at.target.split(":"))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames)
    got = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while b"grpc-status" not in got and (more := await reader.read(1 << 16)):
                got += more
    writer.close()
    return got


@pytest.mark.parametrize("deadline", ["99999999H", "99999999S", "30S"])
def test_a_deadline_of_another_client_reaches_the_stages_or_is_none(deadline: str) -> None:
    async def work(at: Deployment) -> None:
        assert b"PNG" in await ask_with(at, deadline)
        asked = at.thinkers[0].deadlines
        assert asked and all(seconds is None or 20 < seconds < 2e8 for seconds in asked)

    through(work)
