"""The callers of `bench load`, in processes of their own: Poisson arrivals over gRPC and HTTP, and the twins."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from random import Random
from typing import Any

import grpc
from grpc.aio import AioRpcError, Channel
from PIL import Image, ImageChops

from bagel.request import Modality
from bagel.rpc import convert
from bagel.rpc.transport import channel
from bagel.v1 import common_pb2, gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub

CALLERS_PER_CONNECTION = 50
SEEDS = 4
LEAVING = 0.1
LONGEST_S = 60.0
AGAIN_S = 0.1
SIDE = 32
REST = "rest"
KINDS = (*Modality, REST)
BUSY = ("429", "503")
PROMPT = "a large red circle"
PNG = b"\x89PNG"
MOST_STEPS = 1e-3


@dataclass(frozen=True)
class Plan:
    """What one process of callers does. rate: its requests a second; twins: the right answers."""

    address: str
    http: str
    rate: float
    seconds: float
    callers: int
    twins: Mapping[tuple[str, int], bytes]


@dataclass(frozen=True)
class Outcome:
    """How a request ended: right, wrong, refused, left or failed, after how long, and why."""

    kind: str
    seconds: float
    why: str = ""


class Refused(Exception):
    """The gateway has no room."""


def twins(address: str, http: str) -> dict[tuple[str, int], bytes]:
    """Each request's answer while nothing else runs."""

    async def ask() -> dict[tuple[str, int], bytes]:
        async with channel(address) as way:
            return {(kind, seed): await _ask(way, http, kind, seed) for kind in KINDS for seed in range(SEEDS)}

    return asyncio.run(ask())


def capacity(address: str, http: str, at_once: int, seconds: float) -> float:
    """Requests a second that are answered with so many at once, each after the other."""

    async def one(way: Channel, number: int, end: float) -> int:
        choose, count = Random(number), 0
        kind, seed = choose.choice(KINDS), choose.randrange(SEEDS)
        while time.monotonic() < end:
            try:
                await _ask(way, http, kind, seed)
            except Refused:  # the same again: to go on to another kind would favour those that are quick
                await asyncio.sleep(AGAIN_S)
                continue
            count += 1
            kind, seed = choose.choice(KINDS), choose.randrange(SEEDS)
        return count

    async def all_() -> int:
        async with channel(address) as way:
            end = time.monotonic() + seconds
            return sum(await asyncio.gather(*(one(way, number, end) for number in range(at_once))))

    return asyncio.run(all_()) / seconds


def call(plan: Plan, number: int) -> tuple[list[Outcome], float]:
    """Call by the clock; the outcomes, and CPU-seconds of this process meanwhile."""
    cpu = time.process_time()
    outcomes = asyncio.run(_call(plan, Random(number)))
    return outcomes, time.process_time() - cpu


async def _call(plan: Plan, choose: Random) -> list[Outcome]:
    outcomes: list[Outcome] = []
    ways = [channel(plan.address) for _ in range(-(-plan.callers // CALLERS_PER_CONNECTION))]
    try:
        async with asyncio.TaskGroup() as group:
            at = began = time.monotonic()
            while (at := at + choose.expovariate(plan.rate)) < began + plan.seconds:
                # By the clock, not by answers: a slow answer must not thin out the load.
                await asyncio.sleep(at - time.monotonic())
                leaves_s = choose.expovariate(5.0) if choose.random() < LEAVING else LONGEST_S
                kind, seed = choose.choice(KINDS), choose.randrange(SEEDS)
                way = ways[choose.randrange(plan.callers) // CALLERS_PER_CONNECTION]
                group.create_task(_one(plan, way, kind, seed, leaves_s, outcomes))
    finally:
        for way in ways:
            await way.close()
    return outcomes


async def _one(plan: Plan, way: Channel, kind: str, seed: int, leaves_s: float, outcomes: list[Outcome]) -> None:
    began, why, ends = time.monotonic(), "", "right"
    try:
        async with asyncio.timeout(leaves_s):
            if not _same(await _ask(way, plan.http, kind, seed), plan.twins[kind, seed]):
                ends, why = "wrong", f"{kind} of seed {seed}"
    except TimeoutError:
        ends, why = ("left", "") if leaves_s < LONGEST_S else ("failed", f"no answer in {LONGEST_S:g} s")
    except Refused as refusal:
        ends, why = "refused", str(refusal)
    except (AioRpcError, OSError, asyncio.IncompleteReadError, AssertionError) as error:
        ends, why = "failed", f"{type(error).__name__}: {error!s:.200}"
    outcomes.append(Outcome(ends, time.monotonic() - began, why))


async def _ask(way: Channel, http: str, kind: str, seed: int) -> bytes:
    """A picture's file, or a text. Raises Refused."""
    if kind == REST:
        return await _draw_over_http(http, seed)
    call: Any = GatewayServiceStub(way).Generate(_request(Modality(kind), seed))
    parts: list[bytes] = []
    try:
        async for event in call:
            if event.HasField("picture"):
                parts.append(event.picture.data)
            elif event.HasField("text"):
                parts.append(event.text.text.encode())
    except AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise Refused(error.details()) from None
        raise
    finally:
        call.cancel()
    assert parts, "an answer without a picture or a text"
    return b"".join(parts)


def _request(modality: Modality, seed: int) -> gateway_pb2.GenerateRequest:
    parts = [common_pb2.Part(text=common_pb2.TextPart(text=f"{PROMPT} {seed}"))]
    if modality in (Modality.IMG2IMG, Modality.IMG2TEXT):
        file = BytesIO()
        Image.new("RGB", (SIDE, SIDE), (40 * seed, 90, 200)).save(file, "PNG")
        parts.insert(0, common_pb2.Part(image=common_pb2.ImagePart(data=file.getvalue())))
    pictures: dict[str, Any] = {"steps": 2, "height": SIDE, "width": SIDE}
    options = pictures if modality in (Modality.TEXT2IMG, Modality.IMG2IMG) else {"max_tokens": 4}
    return gateway_pb2.GenerateRequest(request=convert.options_to_wire(modality, parts, {**options, "seed": seed}))


async def _draw_over_http(address: str, seed: int) -> bytes:
    """A picture on a connection of its own, which is closed when the caller leaves."""
    host, _, port = address.rpartition(":")
    request = {"prompt": f"{PROMPT} {seed}", "size": f"{SIDE}x{SIDE}", "num_inference_steps": 2, "seed": seed}
    body = json.dumps(request).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        status = answer.split()[1].decode()
        told = await reader.read()
    finally:
        writer.close()
    if status in BUSY:
        raise Refused(told.decode()[:200])
    assert status == "200", f"{status}: {told[:200]!r}"
    data: Sequence[Mapping[str, str]] = json.loads(told)["data"]
    return b64decode(data[0]["b64_json"])


def _same(found: bytes, right: bytes) -> bool:
    """Whether two answers are equal; of pictures by their pixels, but for single steps of 255 in few of them.

    A batch of other pictures beside it changes the order of sums.
    """
    if found == right or not right.startswith(PNG):
        return found == right
    with Image.open(BytesIO(found)) as one, Image.open(BytesIO(right)) as other:
        if one.size != other.size:
            return False
        steps = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).tobytes()
    return max(steps) <= 1 and sum(steps) <= MOST_STEPS * len(steps)
