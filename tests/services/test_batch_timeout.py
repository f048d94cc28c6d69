"""--batch-timeout in every topology: who finds no place in a stage in time is refused as busy, by either front."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bagel.client import Client
from bagel.deployment.process import Service
from bagel.errors import Busy
from bagel.events import StepDone, TextDelta
from bagel.rpc.transport import sync_channel
from bagel.v1 import common_pb2, gateway_pb2
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from bench.attack_files import large_png
from tests.shared import Borrow, Stages

pytestmark = pytest.mark.slow  # each start of services takes seconds

TIMEOUT_S = 1
LONG: dict[str, Any] = {"steps": 1000, "height": 512, "width": 512}
LONG_THOUGHT: dict[str, dict[str, Any]] = {"bagel_think": {"max_think_tokens": 30_000}}
"""Refused where nothing is thought."""
FULL_STAGE = {"bagel": "dit-0", "bagel_think": "thinker-0", "bagel_single_stage": "dit-0"}
"""Whose one place the first request has: under bagel_think it still writes its plan."""


@pytest.fixture
def tight(borrow: Borrow) -> Callable[[str], Stages]:
    """Services of a topology with one place in each stage, for which a request waits a second."""
    flags = {"max_num_seqs": 1, "batch_timeout": TIMEOUT_S}
    return lambda topology: borrow("bagel_single_stage" if topology == "bagel_single_stage" else "bagel", **flags)


@pytest.fixture(params=FULL_STAGE)
def gateway(request: pytest.FixtureRequest, tight: Callable[[str], Stages]) -> Iterator[Service]:
    """That of a topology, and a request that has the one place for as long as the test runs."""
    limits = ("--batch-timeout", str(TIMEOUT_S), "--http", "127.0.0.1:0")
    running = tight(request.param).gateway(*limits, pipeline=request.param)
    with Client(running.address(0)) as client:
        first = client.stream("a red cube", **LONG, **LONG_THOUGHT.get(request.param, {}))
        while not isinstance(next(first), StepDone | TextDelta):
            pass
        yield running
        first.close()


def test_who_waits_too_long_is_refused_as_busy(gateway: Service, request: pytest.FixtureRequest) -> None:
    stage, address = FULL_STAGE[request.node.callspec.params["gateway"]], gateway.address(0)
    began = time.monotonic()
    with Client(address) as client, pytest.raises(Busy, match=f"{stage} is busy: .* within 1 s") as busy:
        client.generate("another", steps=2, height=64, width=64)
    assert time.monotonic() - began >= TIMEOUT_S  # it had its time to wait
    assert busy.value.retry_after_s == TIMEOUT_S

    message = gateway_pb2.GenerateRequest()
    message.request.modality = common_pb2.MODALITY_TEXT2IMG
    message.request.prompt.add().text.text = "another"
    with sync_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        list(GatewayServiceStub(channel).Generate(message, timeout=60))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(refused.value).details)

    body = json.dumps({"prompt": "another", "size": "64x64"}).encode()
    asked = urllib.request.Request(
        f"http://{gateway.http}/v1/images/generations", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(asked, timeout=60)
    with answer.value as told:
        assert told.code == 429 and int(told.headers["Retry-After"]) >= 1
        assert stage in json.load(told)["error"]["message"]


def test_a_text_waits_for_no_place_that_a_request_has_whose_pictures_are_being_read(
    tight: Callable[[str], Stages],
) -> None:
    """Large pictures take seconds to decode; the places of a Thinker are for what is written."""
    picture = large_png()

    def describe(client: Client) -> object:
        return client.generate("what is it?", modality="img2text", image=picture, max_tokens=1)

    with Client(tight("bagel").address) as client, ThreadPoolExecutor(3) as pool:
        describing = [pool.submit(describe, client) for _ in range(3)]
        for seed in range(8):
            assert client.generate("a", modality="text2text", max_tokens=1, seed=seed).text is not None
            time.sleep(0.2)
        for each in describing:
            each.exception(60)  # as it may be: it is one place for three
