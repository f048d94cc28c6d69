"""Whatever a service is sent by gRPC: an answer or a status that tells the caller why, and a service that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagel.client import Client
from bagel.kv.codec import PAGE_VERSION
from bagel.rpc.transport import sync_channel
from bagel.v1 import common_pb2, dit_pb2, gateway_pb2, kv_pb2, thinker_pb2
from bagel.v1.dit_pb2_grpc import DitServiceStub
from bagel.v1.gateway_pb2_grpc import GatewayServiceStub
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub
from tests.services.grpc_messages import DIGESTS, image_file, messages, near
from tests.shared import Borrow

pytestmark = pytest.mark.slow

LIMIT_S = 60
SMALL = '{"steps": 3, "height": 32, "width": 32, "max_tokens": 3, "max_think_tokens": 3}'
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
}
"""Statuses that say what is wrong with the request. The last one: a picture is not drawn from fewer contexts than it
needs. A service that broke, or hung, says another."""
METHODS = {
    "gateway": ("GatewayService/Generate", "GatewayService/DescribeModel"),
    "thinker-0": ("ThinkerService/BuildContext", "ThinkerService/Describe", "KvBlocksService/Pull"),
    "dit-0": ("DitService/Generate", "KvBlocksService/Renew", "KvBlocksService/GetStats"),
    "dit-1": ("DitService/Generate",),
}
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

Part, Text, ImagePart = common_pb2.Part, common_pb2.TextPart, common_pb2.ImagePart
text_parts = [Part(text=Text(text="a red cube"))]
image_parts = [Part(image=ImagePart(data=image_file())), *text_parts]
SMALL_IMAGE = common_pb2.ImageSettings(steps=3, height=32, width=32)
SMALL_TEXT = common_pb2.TextSettings(max_tokens=3)


@pytest.fixture
def services(borrow: Borrow) -> dict[str, str]:
    """Addresses of a gateway, its Thinker and DiT, and dit-1, which serves whole requests."""
    two = borrow("bagel", max_num_seqs=1, batch_timeout=1)
    gateway = two.gateway("--sampling-defaults", SMALL)
    single = borrow("bagel_single_stage", max_num_seqs=1, batch_timeout=1)
    two_stages = {name: two.stage(name) for name in ("thinker-0", "dit-0")}
    return {"gateway": gateway.address(0), "dit-1": single.stage("dit-0"), **two_stages}


@pytest.fixture
def channels(services: dict[str, str]) -> Iterator[dict[str, grpc.Channel]]:
    made = {name: sync_channel(address) for name, address in services.items()}
    yield made
    for channel in made.values():
        channel.close()


@pytest.fixture(autouse=True)
def served_afterwards(services: dict[str, str]) -> Iterator[None]:
    """After each test all of them still serve, and nothing is held."""
    yield
    with Client(services["gateway"]) as client:
        assert client.generate("a red cube", think=True, seed=1).image is not None
    whole = common_pb2.Request(modality=common_pb2.MODALITY_TEXT2TEXT, prompt=text_parts, seed=1, max_think_tokens=3)
    whole.text.CopyFrom(SMALL_TEXT)
    with sync_channel(services["dit-1"]) as channel:
        assert list(DitServiceStub(channel).Generate(dit_pb2.DitServiceGenerateRequest(request=whole), timeout=LIMIT_S))


def status(call: Any, message: Message | bytes) -> grpc.StatusCode:
    """What a call ends with; one of the statuses that are allowed."""
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str | None = None
    try:
        answer = call(message, timeout=LIMIT_S)
        list(answer) if hasattr(answer, "cancel") else answer
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
    lapsed = code is grpc.StatusCode.UNAVAILABLE and (details or "").startswith("lease ")  # one that was, or never was
    assert lapsed or code in ALLOWED, f"{code}: {details}"
    return code


def modalities(parts: dict[int, list[common_pb2.Part]]) -> st.SearchStrategy[common_pb2.Request]:
    """Right requests of each modality."""
    return st.sampled_from(
        [
            common_pb2.Request(
                modality=common_pb2.Modality.ValueType(modality),
                prompt=prompt,
                seed=1,
                max_think_tokens=3,
                text=SMALL_TEXT,
                image=SMALL_IMAGE,
            )
            for modality, prompt in parts.items()
        ]
    )


requests = modalities({1: text_parts, 2: image_parts, 3: image_parts, 4: text_parts})
COUNTS = {
    # Right values are small, so that an example takes a moment; the rest is past every limit.
    "steps": st.sampled_from([0, 1, 2, 3, 1001, 2**32 - 1]),
    "height": st.sampled_from([0, 15, 16, 47, 64, 1025, 2**31, 2**32 - 1]),
    "width": st.sampled_from([0, 15, 16, 47, 64, 1025, 2**31, 2**32 - 1]),
    "max_tokens": st.sampled_from([0, 1, 3, 40_000, 2**32 - 1]),
    "max_think_tokens": st.sampled_from([0, 1, 3, 40_000, 2**32 - 1]),
}
Asked = gateway_pb2.GenerateRequest


@FEW
@given(messages(Asked, COUNTS) | near(requests.map(lambda each: Asked(request=each)), Asked, COUNTS))
def test_the_gateway_answers_every_message(
    channels: dict[str, grpc.Channel], message: gateway_pb2.GenerateRequest
) -> None:
    status(GatewayServiceStub(channels["gateway"]).Generate, message)


Build = thinker_pb2.BuildContextRequest
OF_BUILDS = COUNTS | {"lease_id": st.sampled_from(["", "a", "x" * 64, "x" * 65, "\n"])}


@FEW
@given(messages(Build, OF_BUILDS) | near(st.just(Build(parts=image_parts, seed=1)), Build, OF_BUILDS))
def test_a_thinker_answers_every_message(
    channels: dict[str, grpc.Channel], message: thinker_pb2.BuildContextRequest
) -> None:
    stub = KvBlocksServiceStub(channels["thinker-0"])
    responses = ThinkerServiceStub(channels["thinker-0"]).BuildContext
    leases = []

    def building(request: thinker_pb2.BuildContextRequest, timeout: float) -> Any:
        for response in responses(request, timeout=timeout):
            leases.append(response.context.lease_id)

    status(building, message)
    stub.Release(kv_pb2.ReleaseRequest(lease_ids=filter(None, leases)), timeout=LIMIT_S)


@pytest.mark.parametrize("parts", [[], [Part(text=Text(text=""))], [*image_parts, Part(text=Text())]])
@pytest.mark.parametrize("service", ["thinker-0", "dit-1"])
def test_an_empty_prompt_or_text_is_refused_by_each_service(
    channels: dict[str, grpc.Channel], service: str, parts: list[common_pb2.Part]
) -> None:
    """The gateway refuses a text of blanks too, but a negative prompt of blanks it passes on."""
    if service == "thinker-0":
        call: Any = ThinkerServiceStub(channels[service]).BuildContext
        message: Message = thinker_pb2.BuildContextRequest(parts=parts)
    else:
        call = DitServiceStub(channels[service]).Generate
        whole = common_pb2.Request(modality=common_pb2.MODALITY_TEXT2IMG, prompt=parts, image=SMALL_IMAGE)
        message = dit_pb2.DitServiceGenerateRequest(request=whole)
    assert status(call, message) is grpc.StatusCode.INVALID_ARGUMENT


def contexts(fingerprint: bytes) -> dict[str, st.SearchStrategy[Any]]:
    """Contexts that a DiT may be sent to, most of them nowhere."""
    return {
        "source": st.sampled_from(["thinker-0", "thinker-0", "elsewhere", "127.0.0.1:1", ""]),
        "lease_id": st.sampled_from(["", "gone"]),
        "fingerprint": st.sampled_from([fingerprint, fingerprint, b"", b"other"]),
        "page_version": st.sampled_from([PAGE_VERSION, PAGE_VERSION, 0, 2**32 - 1]),
        "digest": DIGESTS,
        "length": st.sampled_from([0, 1, 7, 4000, 2**20, 2**32 - 1]),
    }


@pytest.fixture
def fingerprint(channels: dict[str, grpc.Channel]) -> bytes:
    told = DitServiceStub(channels["dit-0"]).Describe(dit_pb2.DitServiceDescribeRequest(), timeout=LIMIT_S)
    return told.model.kv_fingerprint


@pytest.mark.parametrize("service", ["dit-0", "dit-1"])
@FEW
@given(data=st.data())
def test_a_dit_answers_every_message(
    channels: dict[str, grpc.Channel], fingerprint: bytes, service: str, data: st.DataObject
) -> None:
    kind = dit_pb2.DitServiceGenerateRequest
    named = COUNTS | contexts(fingerprint)
    # A context without segments is drawn from as it is, so every branch may be one.
    empty = [dit_pb2.BranchContext(branch=dit_pb2.BranchName.ValueType(number)) for number in (1, 2, 3)]
    drawn = kind(draw=dit_pb2.DrawPicture(contexts=empty, image=SMALL_IMAGE, seed=1))
    right = st.just(drawn) if service == "dit-0" else requests.map(lambda each: kind(request=each))
    message = data.draw(messages(kind, named) | near(right, kind, named))
    status(DitServiceStub(channels[service]).Generate, message)


@pytest.fixture
def held(channels: dict[str, grpc.Channel]) -> Iterator[tuple[bytes, str]]:
    """A segment that the Thinker holds, and the lease under which it does."""
    message = thinker_pb2.BuildContextRequest(parts=text_parts, seed=1, send_kv=True)
    first, *_ = ThinkerServiceStub(channels["thinker-0"]).BuildContext(message, timeout=LIMIT_S)
    yield first.context.segments[0].digest, first.context.lease_id
    release = kv_pb2.ReleaseRequest(lease_ids=[first.context.lease_id])
    KvBlocksServiceStub(channels["thinker-0"]).Release(release, timeout=LIMIT_S)


@FEW
@given(data=st.data())
def test_a_store_answers_every_message(
    channels: dict[str, grpc.Channel], fingerprint: bytes, held: tuple[bytes, str], data: st.DataObject
) -> None:
    stub = KvBlocksServiceStub(channels["thinker-0"])
    digest, lease = held
    named = contexts(fingerprint) | {
        "lease_id": st.sampled_from([lease, lease, "gone", ""]),
        "digest": st.just(digest) | DIGESTS,
        "digests": st.just(digest) | DIGESTS,
    }
    right = kv_pb2.PullRequest(digests=[digest], fingerprint=fingerprint, lease_id=lease, page_version=PAGE_VERSION)
    pulls = messages(kv_pb2.PullRequest, named) | near(st.just(right), kv_pb2.PullRequest, named)
    status(stub.Pull, data.draw(pulls))
    ids = st.lists(st.sampled_from(["", "gone", "x" * 1000]), max_size=3)
    status(stub.Renew, kv_pb2.RenewRequest(lease_ids=[lease, *data.draw(ids)]))
    status(stub.Release, kv_pb2.ReleaseRequest(lease_ids=data.draw(ids)))


@pytest.mark.parametrize(("service", "method"), [(name, each) for name, methods in METHODS.items() for each in methods])
@settings(FEW, max_examples=15)
@given(payload=st.binary(max_size=40) | st.just(b"\x0a\xff\xff\xff\xff\x0f") | st.just(b"\xff" * 20))
def test_bytes_that_are_no_message_are_told_so(
    channels: dict[str, grpc.Channel], service: str, method: str, payload: bytes
) -> None:
    """Every method as a stream: a unary one answers with one message."""
    call: Any = channels[service].unary_stream(f"/bagel.v1.{method}", None, None)
    code = status(call, payload)
    if payload == b"\xff" * 20:
        assert code is grpc.StatusCode.INVALID_ARGUMENT
