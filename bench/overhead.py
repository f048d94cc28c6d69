"""The cost of the gateway: the same picture from the DiT directly, through the gateway by gRPC, and by REST."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError

from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.errors import Busy
from bagel.pipelines import BAGEL_SINGLE_STAGE
from bagel.prompts import TextPart
from bagel.request import Modality, resolve
from bagel.rpc import convert
from bagel.rpc.transport import channel
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2
from bagel.v1.dit_pb2_grpc import DitServiceStub
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from bench.report import Table

RATE = 20.0
"""Requests per second over all three ways. A slow machine cannot draw as many and needs a lower --rate."""
WARM_UP = 30
PER_REPEAT = 120
"""Requests per way and repeat."""
P50_MS, P99_MS = 5.0, 15.0
"""The most that the gateway may add."""
NOTE = (
    f"{NANO_NAME}, single stage, one Euler step of 32 x 32, {{rate:g}} requests a second; latency at the client, and "
    f"what it is above the direct call's; limits {P50_MS:g} and {P99_MS:g} ms"
)
PROMPT = "a large red circle"
OPTIONS: Mapping[str, Any] = {"steps": 2, "height": 32, "width": 32}

Call = Callable[[int], Awaitable[None]]


def run(repeats: int, rate: float) -> Iterator[Table]:
    """Measure all three ways in one run, interleaved."""
    table = Table("gateway overhead", NOTE.format(rate=rate))
    _, checkpoint = find_model(NANO_NAME)
    config = load_deploy_config(shipped_deploy_config(BAGEL_SINGLE_STAGE.model_type))
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, checkpoint.folder, device="cpu", logs=nowhere, http="127.0.0.1:0") as services,
    ):
        try:
            found = asyncio.run(_measure(services, repeats * PER_REPEAT, rate))
        except BaseExceptionGroup as failed:
            if failed.subgroup(_is_busy) is None:
                raise
            raise Busy(f"{rate:g} requests a second are more than this machine draws; lower --rate", 0.0) from None
    direct = _percentiles(found["direct"])
    for name, latencies in found.items():
        p50, p99 = _percentiles(latencies)
        over = (p50 - direct[0], p99 - direct[1])
        table.add(case=name, p50_ms=p50, p99_ms=p99, over_p50_ms=over[0], over_p99_ms=over[1], requests=len(latencies))
        table.failed |= over[0] > P50_MS or over[1] > P99_MS
    yield table


async def _measure(services: Deployment, count: int, rate: float) -> dict[str, list[float]]:
    dit = channel(services.services[0].address(0))
    gateway, rest = channel(services.address), _Rest(services.http)
    ways: dict[str, Call] = {
        "direct": lambda seed: _draw_direct(DitServiceStub(dit), seed),
        "gRPC": lambda seed: _draw_grpc(GatewayServiceStub(gateway), seed),
        "REST": rest.draw,
    }
    latencies: dict[str, list[float]] = {name: [] for name in ways}

    async def one(name: str, seed: int) -> None:
        began = time.perf_counter()
        await ways[name](seed)
        if seed >= WARM_UP:  # the first ones connect and warm up
            latencies[name].append(1e3 * (time.perf_counter() - began))

    async with asyncio.TaskGroup() as group:
        began = time.perf_counter()
        for number, name in enumerate(_order(list(ways), count + WARM_UP // len(ways))):
            # By the clock, not by answers: a slow answer must not thin out the load.
            await asyncio.sleep(began + number / rate - time.perf_counter())
            group.create_task(one(name, number))
    rest.close()
    await gateway.close()
    await dit.close()
    return latencies


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, AioRpcError) and error.code() is StatusCode.RESOURCE_EXHAUSTED


def _order(ways: list[str], rounds: int) -> Iterator[str]:
    """Each way once per round, in random order."""
    # In a fixed order each way would always wait behind a picture of the same other way.
    shuffle = Random(0)
    for _ in range(rounds):
        yield from shuffle.sample(ways, len(ways))


async def _draw_direct(stub: DitServiceStub, seed: int) -> None:
    """Draw as the gateway lets a single stage draw."""
    request = resolve(Modality.TEXT2IMG, (TextPart(PROMPT),), {**OPTIONS, "seed": seed})
    message = convert.request_to_wire(request, [common_pb2.Part(text=common_pb2.TextPart(text=PROMPT))])
    call: Any = stub.Generate(dit_pb2.DitServiceGenerateRequest(request=message))
    events = [event async for event in call]
    assert any(event.HasField("picture") for event in events)


async def _draw_grpc(stub: GatewayServiceStub, seed: int) -> None:
    parts = [common_pb2.Part(text=common_pb2.TextPart(text=PROMPT))]
    request = convert.options_to_wire(Modality.TEXT2IMG, parts, {**OPTIONS, "seed": seed})
    call: Any = stub.Generate(gateway_pb2.GenerateRequest(request=request))
    events = [event async for event in call]
    assert any(event.HasField("picture") for event in events)


class _Rest:
    """A pool of keep-alive connections, one per request in progress."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def draw(self, seed: int) -> None:
        """Draw one picture."""
        size = f"{OPTIONS['width']}x{OPTIONS['height']}"
        request = {"prompt": PROMPT, "size": size, "num_inference_steps": OPTIONS["steps"], "seed": seed}
        body = json.dumps(request).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\nContent-Type: application/json\r\n"
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("content-length: ")[2].partition("\r\n")[0])
        body = await reader.readexactly(length)
        assert answer.startswith("http/1.1 200"), body
        self._idle.append((reader, writer))

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()


def _percentiles(latencies: list[float]) -> tuple[float, float]:
    return median(latencies), quantiles(latencies, n=100)[98]
