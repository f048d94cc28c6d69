"""One request is one trace: its spans are told to an OTLP receiver, from every service that it went through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest.mock import AsyncMock

import openai
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.errors import BagelError, ConfigError, InvalidRequest, KvTimeout
from bagel.rpc.errors import streaming
from bagel.telemetry import metrics, tracing
from tests.conftest import GOLDEN
from tests.otlp import Traces, attributes, receiving

MODEL = GOLDEN / "checkpoint"
DRAWN = "bagel.v1.DitService/Generate"
CALLER, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LONG = {"num_inference_steps": 900, "progress": True}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Traces]:
    """The spans of requests over gRPC and then over HTTP, told by services that have ended."""
    config = load_deploy_config(shipped_deploy_config("bagel"))
    with receiving() as (endpoint, traces, _):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with Deployment(config, MODEL, device="cpu", env=env, http="127.0.0.1:0") as running:
            ask_over_grpc(running.address)
            ask_over_http(f"http://{running.http}/v1")
        yield traces


def ask_over_grpc(address: str) -> None:
    with Client(address) as client:
        drawn = client.generate("a red circle", steps=12, height=64, width=64, think=True, max_think_tokens=4)
        assert drawn.image is not None
        with pytest.raises(BagelError):
            client.generate("a red circle", steps=4, height=100_000, width=64)


def ask_over_http(url: str) -> None:
    asked: dict[str, Any] = {"prompt": "a red circle", "size": "64x64", "extra_body": {"num_inference_steps": 4}}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        client.models.list()
        headers = {"traceparent": f"00-{CALLER}-{PARENT}-01", "x-request-id": "mine"}
        client.images.generate(**asked, extra_headers=headers)
        list(client.images.generate(**asked, stream=True, partial_images=1))
        with pytest.raises(openai.BadRequestError):
            client.images.generate(**asked | {"size": "99999x64"})
        with client.images.generate(**asked | {"extra_body": LONG}, stream=True) as stream:
            next(iter(stream))  # and leave
        with pytest.raises(openai.NotFoundError):
            client.post("/nothing/42", cast_to=object)


@pytest.mark.slow
def test_a_picture_is_one_trace_through_all_services_and_a_refused_request_no_failed_span(receiver: Traces) -> None:
    roots = receiver.named("bagel-gateway", "bagel.v1.GatewayService/Generate")
    root, refused = sorted(roots, key=lambda span: span.start_time_unix_nano)
    of_http = {span.trace_id for _, span in receiver.spans if span.name.startswith("POST")}
    told = [(said, span) for said, span in receiver.spans if span is not refused and span.trace_id not in of_http]
    spans = [span for _, span in told]
    assert {span.trace_id for span in spans} == {root.trace_id} != {refused.trace_id}
    ids = {span.span_id for span in spans}
    assert all(span.parent_span_id in ids for span in spans if span is not root)

    def named(service: str, name: str) -> list[Span]:
        return [span for said, span in told if (said, span.name) == (service, name)]

    prefilled = named("bagel-thinker", "prefill")
    assert len(prefilled) >= 2
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > root.start_time_unix_nano for span in prefilled)
    pulled = [attributes(span.attributes) for span in named("bagel-dit", "kv pull")]
    assert sum(int(each["bytes"]) for each in pulled) > 0
    windows = [attributes(span.attributes) for span in named("bagel-dit", "denoise")]
    assert [(each["first_step"], each["last_step"]) for each in windows] == [(1, 10), (11, 11)]
    assert len(named("bagel-dit", "decode")) == 1
    assert refused.status.code == Status.STATUS_CODE_UNSET
    described = attributes(refused.attributes)
    assert described["rpc.response.status_code"] == "INVALID_ARGUMENT" and "100000" in str(described["bagel.refused"])


@pytest.mark.slow
def test_requests_over_http_are_traces_too_below_the_callers_span(receiver: Traces) -> None:
    roots = [span for said, span in receiver.spans if said == "bagel-gateway" and span.name.startswith("POST")]
    roots.sort(key=lambda span: span.start_time_unix_nano)  # who left is over later than who came after
    assert [span.name for span in roots] == ["POST /v1/images/generations"] * 4 + ["POST"]
    whole, streamed, refused, left, unknown = roots
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (CALLER, PARENT)
    told = attributes(whole.attributes)
    assert (told["http.response.status_code"], told["request_id"]) == (200, "mine")
    assert (told["http.request.method"], told["http.route"]) == ("POST", "/v1/images/generations")
    for root in (whole, streamed):
        of = [span for span in receiver.named("bagel-dit", DRAWN) if span.trace_id == root.trace_id]
        assert [span.parent_span_id for span in of] == [root.span_id]
        assert of[0].end_time_unix_nano <= root.end_time_unix_nano, "a stream is over with its last event"
        assert root.status.code == Status.STATUS_CODE_UNSET
    assert attributes(refused.attributes)["http.response.status_code"] == 400
    assert refused.status.code == Status.STATUS_CODE_UNSET and "error.type" not in attributes(refused.attributes)
    assert "is 99999" in str(attributes(refused.attributes)["bagel.refused"])
    assert "bagel.cancelled" in attributes(left.attributes) and "bagel.cancelled" not in told
    assert left.status.code == Status.STATUS_CODE_UNSET
    assert attributes(unknown.attributes)["http.response.status_code"] == 404


@pytest.mark.parametrize(("error", "failed"), [(InvalidRequest("n", "wrong"), False), (KvTimeout("late"), True)])
def test_only_what_is_the_services_own_fault_is_an_error(
    error: BagelError, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Servicer:
        @streaming
        async def Generate(self, request: object, context: Any) -> AsyncIterator[object]:
            yield request
            raise error

    spans, seen = InMemorySpanExporter(), list[dict[str, Any]]()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("bagel"))
    monkeypatch.setattr(metrics._calls, "record", lambda seconds, attributes: seen.append(attributes))

    async def call() -> None:
        context = AsyncMock(invocation_metadata=lambda: (), set_trailing_metadata=lambda metadata: None)
        assert len([each async for each in Servicer().Generate(object(), context)]) == 1

    asyncio.run(call())
    [span], [told] = spans.get_finished_spans(), seen
    assert (span.status.status_code is StatusCode.ERROR) == failed == ("error.type" in (span.attributes or {}))
    assert ("error.type" in told) == failed and told["rpc.response.status_code"] == error.grpc_status


def test_what_the_environment_asks_and_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER is 'zipkin'"):
        tracing.set_up_tracing("dit", "dit-0")


def test_spans_that_nobody_wants_cost_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    begun = time.perf_counter()
    tracing.record("nothing", begun)
    tracing.set_up_tracing("dit", "dit-0")
    assert tracing.trace_metadata() == ()
