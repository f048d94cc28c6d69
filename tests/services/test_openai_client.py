"""OpenAI's client, unmodified, against all services with the shipped model: pictures, edits, streams, chats."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from bagel.client import Client
from bagel.deployment.defaults import NANO_NAME
from bagel.events import Preview, StepDone
from examples import openai_client
from tests.helpers import agree, sketch
from tests.shared import Borrow, Stages, released, stats

pytestmark = pytest.mark.slow  # each start of services takes seconds

LEAVERS = 200
STEPS: dict[str, Any] = {"num_inference_steps": 8, "seed": 5}


@pytest.fixture
def services(borrow: Borrow) -> Stages:
    """Thinker, DiT and gateway with bagel-nano."""
    return borrow("bagel", NANO_NAME)


@pytest.fixture
def client(services: Stages) -> Iterator[OpenAI]:
    options: dict[str, Any] = {"max_retries": 0, "timeout": 120, "_strict_response_validation": True}
    with OpenAI(base_url=f"http://{services.http}/v1", api_key="none", **options) as client:
        yield client


def png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def decoded(data: str | None) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(data or "")))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())


def image_part(image: Image.Image) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(image)).decode()},
    }


def test_pictures_of_one_call_are_those_of_grpc_and_share_one_prefill(services: Stages, client: OpenAI) -> None:
    thinker = services.stage("thinker-0")
    before = stats(thinker)
    answer = client.images.generate(prompt="three of these", n=3, size="64x96", extra_body=STEPS)
    assert stats(thinker).computed_segments - before.computed_segments == 1
    assert answer.data is not None and answer.usage is not None and answer.size == "64x96"
    with Client(services.address) as grpc:
        for number, item in enumerate(answer.data):
            result = grpc.generate("three of these", steps=8, seed=5 + number, width=64, height=96)
            assert result.image is not None and agree(decoded(item.b64_json), result.image)
    assert answer.usage.input_tokens == result.usage["prompt_tokens"]
    assert answer.usage.output_tokens == 3 * 64 * 96 // 256
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize(("format_", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client: OpenAI, format_: Any, name: str) -> None:
    answer = client.images.generate(prompt="a star", output_format=format_, size="64x64", extra_body=STEPS)
    assert answer.data is not None and decoded(answer.data[0].b64_json).format == name


def test_compression_makes_smaller_files(client: OpenAI) -> None:
    sizes = []
    asked: dict[str, Any] = {"prompt": "three red stars", "size": "128x128", "extra_body": STEPS}
    for quality in (5, 100):  # of one picture, large enough for more than the headers to count
        answer = client.images.generate(**asked, output_format="jpeg", output_compression=quality)
        assert answer.data is not None
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes[0] < sizes[1] / 2


def test_previews_come_on_the_way_near_the_picture_and_do_not_change_it(services: Stages, client: OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": "a large red circle", "size": "128x128"}
    options = {"num_inference_steps": 20, "seed": 3}
    plain = client.images.generate(**asked, extra_body=options)
    *previews, last = client.images.generate(**asked, stream=True, partial_images=3, extra_body=options)
    assert [each.type for each in previews] == ["image_generation.partial_image"] * 3
    assert [each.partial_image_index for each in previews] == [0, 1, 2]
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 64
    assert plain.data is not None
    final = decoded(plain.data[0].b64_json)
    assert same(decoded(last.b64_json), final)
    distances = [
        np.abs(np.asarray(decoded(each.b64_json), dtype=float) - np.asarray(final, dtype=float)).mean()
        for each in previews
    ]
    assert distances[2] < distances[0] and distances[2] < 25
    with Client(services.address) as grpc:
        events = list(grpc.stream(**{"prompt": asked["prompt"], "steps": 20, "seed": 3, "partial_images": 2}))
    found = [event for event in events if isinstance(event, Preview)]
    assert [(event.number, event.step) for event in found] == [(0, 4), (1, 12)]
    first_preview = events.index(found[0])
    assert any(isinstance(event, StepDone) for event in events[first_preview:])


def test_an_edit_of_several_images_in_both_ways(client: OpenAI) -> None:
    images = [("a.png", png(sketch(64, 64)), "image/png"), ("b.png", png(sketch(96, 64, "navy")), "image/png")]
    whole = client.images.edit(image=images, prompt="blend them", extra_body=STEPS)
    *_, last = client.images.edit(image=images, prompt="blend them", stream=True, extra_body=STEPS)
    assert whole.data is not None and whole.usage is not None
    assert last.type == "image_edit.completed" and same(decoded(last.b64_json), decoded(whole.data[0].b64_json))
    details = whole.usage.input_tokens_details
    assert details.image_tokens > 0 and whole.usage.input_tokens == details.image_tokens + details.text_tokens


def test_chats_stream_what_they_answer_whole(services: Stages, client: OpenAI) -> None:
    content = [{"type": "text", "text": "describe the image"}, image_part(sketch(128, 128))]
    asked: dict[str, Any] = {"model": NANO_NAME, "messages": [{"role": "user", "content": content}], "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for number, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == number]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content != ""
        assert (mine[0].delta.role, mine[-1].finish_reason) == ("assistant", choice.finish_reason)
    told, used = whole.usage, chunks[-1].usage
    assert told is not None and used is not None and told.total_tokens == used.total_tokens
    with Client(services.address) as grpc:
        alone = grpc.generate(content[0]["text"], modality="img2text", image=png(sketch(128, 128)))
    assert told.prompt_tokens == alone.usage["prompt_tokens"] + alone.usage["image_tokens"]
    cut = client.chat.completions.create(**asked | {"n": 1}, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage is not None and cut.usage.completion_tokens == 2


def test_a_chat_draws_and_its_answer_can_be_sent_back_to_be_edited(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": NANO_NAME, "extra_body": {"modalities": ["image"], "size": "64x64", **STEPS}}
    user = {"role": "user", "content": "a green star"}
    first = client.chat.completions.create(messages=[user], **asked)  # type: ignore[list-item]
    message = first.choices[0].message.model_dump()
    assert first.usage is not None and first.usage.completion_tokens == 16
    again = {"role": "user", "content": "make it red"}
    second = client.chat.completions.create(messages=[user, message, again], **asked)  # type: ignore[list-item]
    assert second.usage is not None and second.usage.prompt_tokens > first.usage.prompt_tokens + 16
    assert second.choices[0].message.model_extra and second.choices[0].message.model_extra["images"]


def test_a_picture_that_is_thought_about_comes_with_its_text(client: OpenAI) -> None:
    options = STEPS | {"think": True, "max_think_tokens": 12, "progress": True}
    lenient: Any = client.copy(_extra_kwargs={"_strict_response_validation": False})  # events of our own
    events = list(lenient.images.generate(prompt="a star", size="64x64", stream=True, extra_body=options))
    kinds = [event.type for event in events]
    ours: list[dict[str, Any]] = [event.model_dump() for event in events]
    text = "".join(event["delta"] for event in ours if event["type"] == "image_generation.think_text.delta")
    last = events[-1]
    assert text and last.think_text == text
    assert kinds.count("image_generation.progress") == 7
    assert last.usage.output_tokens > 16


def test_a_prompt_longer_than_the_model_is_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="positions") as caught:
        client.images.generate(prompt="star " * 100_000)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="positions") as caught:
        client.chat.completions.create(
            model=NANO_NAME, messages=[{"role": "user", "content": "x"}], max_completion_tokens=10**6
        )
    assert caught.value.param == "max_completion_tokens"


def test_a_client_that_leaves_frees_everything(services: Stages, client: OpenAI) -> None:
    for stream in (False, True):
        connection = http.client.HTTPConnection(services.http, timeout=30)
        body = {"prompt": "a long one", "num_inference_steps": 900, "n": 3, "stream": stream}
        body |= {"progress": True} if stream else {}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
        if stream:
            assert connection.getresponse().readline().startswith(b"event: ")
        else:
            time.sleep(1)
        connection.close()
        assert client.images.generate(prompt="the next", size="64x64", extra_body=STEPS).data
        assert released(services.stage("thinker-0"), services.stage("dit-0"))
        deadline = time.monotonic() + 10
        while "bagel_requests_under_way 0.0" not in metrics(services):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def metrics(services: Stages) -> str:
    connection = http.client.HTTPConnection(services.http, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_two_hundred_callers_who_leave_at_random_change_nothing_for_the_others(
    services: Stages, client: OpenAI
) -> None:
    alone = [_told(call(client)) for call in CALLS * 2]
    survivors = asyncio.run(_amid_callers_who_leave(services.http, LEAVERS))
    assert [_alike(*pair) for pair in zip(alone, survivors, strict=True)] == [True] * len(alone)
    assert released(services.stage("thinker-0"), services.stage("dit-0"))
    assert "\nbagel_requests_under_way 0.0\n" in metrics(services)
    assert "\nbagel_requests_waiting 0.0\n" in metrics(services)


def _draw(client: Any, **more: Any) -> Any:
    return client.images.generate(prompt="a large red circle", size="64x64", extra_body=STEPS, **more)


def _edit(client: Any) -> Any:
    return client.images.edit(image=png(sketch(64, 64)), prompt="make it blue", extra_body=STEPS)


def _chat(client: Any) -> Any:
    content = [image_part(sketch(64, 64)), {"type": "text", "text": "describe the image"}]
    return client.chat.completions.create(
        model=NANO_NAME, messages=[{"role": "user", "content": content}], max_tokens=12
    )


CALLS: tuple[Callable[[Any], Any], ...] = (_draw, _edit, _chat)


def _told(answer: Any) -> str | Image.Image:
    """What a caller sees of an answer."""
    return answer.choices[0].message.content if hasattr(answer, "choices") else decoded(answer.data[0].b64_json)


def _alike(one: str | Image.Image, other: str | Image.Image) -> bool:
    if isinstance(one, Image.Image) and isinstance(other, Image.Image):
        return agree(one, other)
    return one == other


async def _amid_callers_who_leave(http: str, leavers: int) -> list[str | Image.Image]:
    """What CALLS come to while others are begun and left at random moments, by closing their connections."""
    chance = random.Random(6)

    async def leave(client: AsyncOpenAI) -> None:
        await asyncio.sleep(chance.random() * 8)
        with suppress(TimeoutError, openai.APIError):
            async with asyncio.timeout(chance.random() * 0.4):
                if chance.random() < 0.5:
                    async for _ in await _draw(client, stream=True, partial_images=2):
                        pass
                else:
                    await chance.choice(CALLS)(client)

    async with AsyncOpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=20, timeout=120) as client:
        leaving = [asyncio.create_task(leave(client)) for _ in range(leavers)]
        answers = await asyncio.gather(*(call(client) for call in CALLS * 2))
        await asyncio.gather(*leaving)
    return list(map(_told, answers))


def test_the_example_runs(services: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    openai_client.main(f"http://{services.http}/v1", tmp_path)
    assert "answer: " in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"drawn-0.png", "drawn-1.png", "edited.webp", "from-a-chat.png"} <= names
    assert {f"image_generation.partial_image-{i}.png" for i in range(2)} <= names
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size == (128, 128)
