"""The clients of a gateway, over a real socket: what goes out, what comes back, and what is raised."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import aclosing
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from PIL import Image

from bagel.client import AsyncClient, Client, PromptPart
from bagel.client.batch import events_of, generate_all
from bagel.errors import Busy, InvalidImage, InvalidRequest, RemoteError
from bagel.events import Accepted, Result, ServiceEvent
from bagel.images import load_image
from bagel.prompts import ImagePart, TextPart
from tests.gateway_stages import Deployment, deployment
from tests.shared import SOCKETS, connections, still


@pytest.fixture
def at() -> Iterator[Deployment]:
    yield from serving(max_requests=4)


def serving(**settings: Any) -> Iterator[Deployment]:
    """A deployment in a thread of its own, as for a client in another process."""
    started: Queue[tuple[Deployment, asyncio.AbstractEventLoop, asyncio.Event]] = Queue()

    async def serve() -> None:
        async with deployment(**settings) as made:
            stop = asyncio.Event()
            started.put((made, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    made, loop, stop = started.get(timeout=20)
    yield made
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


@pytest.fixture
def client(at: Deployment) -> Iterator[Client]:
    with Client(at.target) as made:
        yield made


def sent(at: Deployment, part: int = 0) -> Image.Image:
    """The image that the Thinker was sent with the whole prompt."""
    whole = max(at.thinkers[0].asked, key=lambda build: len(build.parts))
    return load_image(whole.parts[part].image.data)


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "image", "transparent"])
def test_an_image_in_every_form(at: Deployment, client: Client, tmp_path: Path, kind: str) -> None:
    picture = Image.linear_gradient("L").convert("RGB").resize((40, 20))
    file = tmp_path / "in.png"
    picture.save(file)
    image: Any = {
        "path": file,
        "str": str(file),
        "bytes": file.read_bytes(),
        "image": picture,
        "transparent": picture.convert("RGBA"),
    }[kind]
    result = client.generate("make it red", modality="img2img", image=image)
    assert result.image is not None and result.image.size == (1024, 512)
    assert sent(at).tobytes() == picture.tobytes()


def test_a_prompt_of_parts(at: Deployment, client: Client) -> None:
    picture = Image.new("RGB", (20, 40), "red")
    parts: list[PromptPart] = [TextPart("before"), ImagePart(picture, for_generation=False), "after"]
    client.generate(parts, modality="img2text")
    assert sent(at, 1).tobytes() == picture.tobytes()


def test_events_end_with_the_result(client: Client) -> None:
    heard: list[ServiceEvent] = []
    result = client.generate("a red cube", on_event=heard.append, request_id="mine", output_format="png")
    assert isinstance(heard[0], Accepted) and heard[0].request_id == "mine"
    assert heard[-1] is result
    assert {event.index for event in client.stream("a red cube")} == {0}


def test_a_seed_that_was_drawn_is_told(client: Client) -> None:
    one, other = client.generate("a red cube"), client.generate("a red cube")
    assert one.seed != other.seed and one.request_id != other.request_id


def test_an_iterator_that_is_closed_cancels(at: Deployment, client: Client) -> None:
    at.dits[0].go.clear()
    events = client.stream("a red cube")
    assert isinstance(next(events), Accepted)
    events.close()
    asyncio.run(at.settled())
    assert "draw ends" not in at.journal.events


@pytest.mark.skipif(not SOCKETS[0].exists(), reason="no /proc here")
def test_requests_that_are_left_leave_no_connection(at: Deployment) -> None:
    at.dits[0].go.clear()
    for _ in range(3):
        with events_of(at.target, ["a red cube"]) as events:
            assert isinstance(next(events), Accepted)
        assert not still(lambda: [at.target] * connections(at.target))


@pytest.mark.skipif(not SOCKETS[0].exists(), reason="no /proc here")
def test_a_stream_that_is_left_in_asyncio_leaves_no_connection(at: Deployment) -> None:
    async def leave() -> None:
        async with AsyncClient(at.target) as client, aclosing(client.stream("a red cube")) as events:
            assert isinstance(await anext(events), Accepted)

    async def main() -> None:
        await leave()
        async with asyncio.timeout(10):
            while connections(at.target):
                await asyncio.sleep(0.05)

    at.dits[0].go.clear()
    gc.disable()  # which would close it, some time or other
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_on_event_may_raise(at: Deployment, client: Client) -> None:
    def stop(event: ServiceEvent) -> None:
        raise KeyError("enough")

    at.dits[0].go.clear()
    with pytest.raises(KeyError):
        client.generate("a red cube", on_event=stop)
    asyncio.run(at.settled())


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("sede", {"sede": 1}),
        ("modality", {"modality": "txt2img"}),
        ("output_format", {"output_format": "TGA"}),
        ("image", {"modality": "img2img", "image": "/no/such/file.png"}),
        ("image", {"modality": "img2img", "image": 7}),
        ("image", {"modality": "img2img", "image": Image.new("F", (8, 8))}),
        ("image", {"modality": "img2img", "image": Image.new("RGB", (0, 8))}),
        ("prompt", {"prompt": [7]}),
        ("steps", {"steps": 1}),
    ],
)
def test_what_is_wrong_is_named(client: Client, field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.generate(**{"prompt": "a red cube", **arguments})
    assert refused.value.field == field


def test_a_gateway_that_is_not_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RemoteError, match=r"127\.0\.0\.1:1") as lost:
        client.generate("a red cube")
    assert lost.value.grpc_status == "UNAVAILABLE" and lost.value.http_status == 503


def test_many_come_back_in_order(client: Client) -> None:
    heard: list[ServiceEvent] = []
    requests = [{"prompt": "a red cube", "width": 64 * n, "height": 64, "seed": n} for n in range(1, 7)]
    results = client.generate_many(requests, heard.append)
    assert [result.seed for result in results] == [result.index + 1 for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result.image.width // 64 for result in results if result.image] == [1, 2, 3, 4, 5, 6]
    assert {event.index for event in heard} == set(range(6))
    assert client.generate_many([]) == []


def test_the_first_error_of_many_cancels_the_others(at: Deployment, client: Client) -> None:
    at.dits[0].go.clear()
    with pytest.raises(InvalidRequest, match="steps"):
        client.generate_many([{"prompt": "a red cube"}, {"prompt": "another", "steps": 1}])
    with pytest.raises(InvalidRequest, match="no prompt"):
        client.generate_many([{"seed": 1}])
    asyncio.run(at.settled())


@pytest.mark.parametrize("at_once", [0, -1, True, "2", 1.5])
def test_at_once_is_a_whole_number(at: Deployment, client: Client, at_once: Any) -> None:
    async def run() -> None:
        async with AsyncClient(at.target) as other, asyncio.timeout(10):
            await other.generate_many(["a red cube"], at_once=at_once)

    with pytest.raises(InvalidRequest, match="at_once is"):
        client.generate_many(["a red cube"], at_once=at_once)
    with pytest.raises(InvalidRequest, match="at_once is"):
        asyncio.run(run())


def test_asyncio(at: Deployment) -> None:
    async def run() -> None:
        async with AsyncClient(at.target) as client:
            buffer = BytesIO()
            Image.new("RGB", (32, 32)).save(buffer, "WEBP")
            edit = {"prompt": "make it red", "modality": "img2img", "image": buffer.getvalue()}
            one, other = await client.generate_many([edit, {"prompt": "why?", "modality": "text2text"}])
            assert one.image is not None and (other.index, other.text) == (1, "so be it")
            events = [event async for event in client.stream("a red cube")]
            assert isinstance(events[-1], Result)
            with pytest.raises(InvalidRequest, match="steps"):
                await client.generate_many([{"prompt": "a red cube"}, {"prompt": "another", "steps": 1}])
            with pytest.raises(InvalidImage):
                await client.generate("red", modality="img2img", image=b"no image")
            assert (await client.describe()).pipeline == "bagel"

    asyncio.run(run())


def test_describe(client: Client) -> None:
    described = client.describe(timeout=10)
    assert (described.pipeline, described.model.max_image_size) == ("bagel", 1024)


def drawn_by(way: str, target: str, count: int) -> list[Result]:
    """Pictures of seeds 0, 1, ..., asked for at once in one of the ways there are."""
    requests: list[dict[str, Any]] = [{"prompt": "a red cube", "seed": seed} for seed in range(count)]

    async def from_asyncio() -> list[Result]:
        async with AsyncClient(target) as client:
            return await client.generate_many(requests)

    if way == "batch":
        return generate_all(target, requests)
    if way == "asyncio":
        return asyncio.run(from_asyncio())
    with Client(target) as client:
        return client.generate_many(requests)


@pytest.fixture
def narrow() -> Iterator[Deployment]:
    """A gateway that serves one request at a time and lets none wait."""
    yield from serving(max_requests=1, batch_timeout_s=0)


WAYS = ("threads", "asyncio", "batch")


@pytest.mark.parametrize("way", WAYS)
def test_requests_that_keep_a_gateway_busy_for_each_other_are_all_served(narrow: Deployment, way: str) -> None:
    results = drawn_by(way, narrow.target, 3)
    assert [result.seed for result in results] == [0, 1, 2]


@pytest.mark.parametrize("way", WAYS)
def test_a_gateway_that_others_keep_busy_is_told(narrow: Deployment, way: str) -> None:
    narrow.dits[0].go.clear()
    with Client(narrow.target) as other:
        events = other.stream("a long one")
        next(events)
        with pytest.raises(Busy, match="its limit"):
            drawn_by(way, narrow.target, 2)
        events.close()


def test_waiting_for_its_turn_is_part_of_the_timeout(narrow: Deployment) -> None:
    narrow.dits[0].go.clear()
    requests = [{"prompt": "a red cube", "timeout": 1.5}, {"prompt": "another", "timeout": 1.5}]
    with Client(narrow.target) as client, pytest.raises((Busy, RemoteError)) as told:
        client.generate_many(requests)
    assert told.value.grpc_status in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
    asyncio.run(narrow.settled())
