"""The three services as real processes: what moves between them, and that requests never change each other."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest
from PIL import Image

from bagel.client import AsyncClient, Client
from bagel.errors import BagelError
from bagel.events import Result, StepDone
from bagel.rpc.transport import sync_channel
from tests.helpers import agree, sketch
from tests.shared import Borrow, Stages, released, stats

pytestmark = pytest.mark.slow  # each start of services takes seconds

CANCELS = 200
EDIT: dict[str, Any] = {"modality": "img2img", "steps": 3, "cfg_img_scale": 2.0, "height": 64, "width": 64}
SMALL: dict[str, Any] = {"steps": 4, "height": 64, "width": 64, "seed": 3}


@pytest.fixture
def services(borrow: Borrow) -> Stages:
    """Thinker, DiT and gateway."""
    return borrow("bagel")


@pytest.fixture
def client(services: Stages) -> Iterator[Client]:
    with Client(services.address) as client:
        yield client


def logged(services: Stages, name: str, event: str) -> list[dict[str, Any]]:
    """The log lines of that event."""
    lines = (services.logs / f"{name}.log").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line.get("event") == event]


def test_an_edit_moves_each_page_once_and_a_second_one_of_its_image_next_to_nothing(
    services: Stages, client: Client
) -> None:
    thinker, dit = services.stage("thinker-0"), services.stage("dit-0")
    before, sent = stats(thinker), stats(dit)
    first = client.generate("make it snow", image=sketch(512, 512), seed=1, **EDIT)
    once, received = stats(thinker), stats(dit)
    unique = once.computed_bytes - before.computed_bytes
    pulled = received.received_bytes - sent.received_bytes
    assert once.computed_segments - before.computed_segments == 4  # VAE, ViT, and the text with and without them
    assert unique <= pulled <= 1.05 * unique
    assert first.usage["pulled_bytes"] == pulled
    assert first.usage["computed_tokens"] * (unique // first.usage["computed_tokens"]) == unique
    client.generate("paint it as a watercolour", image=sketch(512, 512), seed=2, **EDIT)
    assert stats(dit).received_bytes - received.received_bytes <= 0.02 * pulled
    assert released(thinker, dit)


def test_the_dit_loads_before_the_thinker_has_finished(services: Stages, client: Client) -> None:
    result = client.generate("more light", image=sketch(640, 640, "navy"), seed=3, request_id="overlap", **EDIT)
    assert result.image is not None
    (landed,) = [line for line in logged(services, "dit-0", "contexts landed") if line["request_id"] == "overlap"]
    built = [line for line in logged(services, "thinker-0", "context built") if line["request_id"] == "overlap"]
    assert landed["first_page_at"] < max(line["last_layer_at"] for line in built if line["last_layer_at"])


def mixed(count: int = 8) -> list[dict[str, Any]]:
    """Requests of all kinds and several sizes."""
    sizes = [(64, 64), (96, 64), (64, 96)]
    requests: list[dict[str, Any]] = []
    for i in range(count):
        height, width = sizes[i % 3]
        picture = {"steps": 3 + i % 3, "height": height, "width": width}
        prompt: dict[str, Any] = {"prompt": f"thing number {i}", "seed": i}
        match i % 4:
            case 0:
                requests.append(prompt | picture | ({"think": True, "max_think_tokens": 6} if i % 8 == 0 else {}))
            case 1:
                requests.append(prompt | picture | {"modality": "img2img", "image": sketch(64 + 16 * i, 80)})
            case 2:
                requests.append(prompt | {"modality": "text2text", "max_tokens": 5, "think": i == 2})
            case 3:
                requests.append(prompt | {"modality": "img2text", "max_tokens": 5, "image": sketch(80, 64 + 16 * i)})
    return requests


def same(one: Result, other: Result) -> bool:
    pictures = one.image is None and other.image is None
    if one.image is not None and other.image is not None:
        pictures = agree(one.image, other.image)
    return pictures and (one.text, one.token_ids) == (other.text, other.token_ids)


def test_concurrent_requests_agree_with_one_by_one_and_cancels_change_nothing(services: Stages, client: Client) -> None:
    requests = mixed()
    alone = [client.generate(**request) for request in requests]
    together = client.generate_many(requests)
    assert [same(*pair) for pair in zip(alone, together, strict=True)] == [True] * len(requests)
    survivors = asyncio.run(amid_cancels(services.address, requests, CANCELS))
    assert [same(*pair) for pair in zip(alone, survivors, strict=True)] == [True] * len(requests)
    assert released(services.stage("thinker-0"), services.stage("dit-0"))


async def amid_cancels(gateway: str, requests: Sequence[dict[str, Any]], cancels: int) -> list[Result]:
    """The requests' results, while others are begun and left at random moments."""
    chance = random.Random(4)

    async def leave(client: AsyncClient, request: dict[str, Any]) -> None:
        await asyncio.sleep(chance.random() * 10)
        with suppress(TimeoutError, BagelError):
            async with asyncio.timeout(chance.random() * 0.5):
                await client.generate(**(request | {"seed": chance.randrange(99)}))

    async with AsyncClient(gateway) as client:
        leaving = [asyncio.create_task(leave(client, chance.choice(requests))) for _ in range(cancels)]
        results = await asyncio.gather(*(client.generate(**request) for request in requests))
        await asyncio.gather(*leaving)
    return list(results)


def test_a_client_that_leaves_stops_the_picture_within_a_step(services: Stages, client: Client) -> None:
    steps = 0
    for event in client.stream("a long one", seed=1, steps=500, height=64, width=64):
        steps += isinstance(event, StepDone)
        if steps == 3:
            break
    assert client.generate("the next", **SMALL).image is not None


def test_a_picture_is_what_was_asked_for(client: Client) -> None:
    result = client.generate("in another format", output_format="JPEG", **SMALL)
    assert isinstance(result.image, Image.Image)
    assert result.image.size == (64, 64)
    assert result.usage["steps"] == 3
    assert {"context", "denoise", "decode", "total"} <= result.timings.keys()


def test_reflection_and_health_name_the_services(services: Stages) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with sync_channel(services.stage("thinker-0")) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"bagel.v1.ThinkerService", "bagel.v1.KvBlocksService"} <= names
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="bagel.v1.ThinkerService")
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(service="bagel.v1.DitService"))
