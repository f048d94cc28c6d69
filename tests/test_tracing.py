"""One request is one trace: its spans are told to an OTLP receiver, from every service that it went through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import bagel
from bagel import tracing
from bagel.config import shipped_deploy_config
from bagel.errors import ConfigError
from tests.conftest import GOLDEN

MODEL = GOLDEN / "checkpoint"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what is exported: (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(named["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, service: str, name: str) -> list[Span]:
        return [span for said, span in self.spans if said == service and span.name == name]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(2))
    kept = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield kept
    server.stop(None)


@pytest.mark.slow
def test_a_picture_is_one_trace_through_all_services(receiver: Receiver) -> None:
    with bagel.Omni(MODEL, deploy_config=shipped_deploy_config("bagel_think"), device="cpu") as omni:
        [result] = omni.generate("a red circle", steps=12, height=64, width=64, max_think_tokens=4)
        assert result.image is not None
    roots = receiver.named("bagel-gateway", "bagel.v1.GatewayService/Generate")
    [root] = roots
    assert {span.trace_id for _, span in receiver.spans} == {root.trace_id}
    ids = {span.span_id for _, span in receiver.spans}
    assert all(span.parent_span_id in ids for _, span in receiver.spans if span is not root)
    prefilled = receiver.named("bagel-thinker", "prefill")
    assert len(prefilled) >= 2
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > root.start_time_unix_nano for span in prefilled)
    pulled = [attributes(span) for span in receiver.named("bagel-dit", "kv pull")]
    assert sum(int(each["bytes"]) for each in pulled) > 0
    windows = [attributes(span) for span in receiver.named("bagel-dit", "denoise")]
    assert [(each["first_step"], each["last_step"]) for each in windows] == [(1, 10), (11, 11)]
    assert len(receiver.named("bagel-dit", "decode")) == 1


@pytest.mark.slow
def test_a_refused_request_is_a_failed_span(receiver: Receiver) -> None:
    with (
        bagel.Omni(MODEL, deploy_config=shipped_deploy_config("bagel"), device="cpu") as omni,
        pytest.raises(bagel.errors.BagelError),
    ):
        omni.generate("a red circle", steps=4, height=100_000, width=64)
    [root] = receiver.named("bagel-gateway", "bagel.v1.GatewayService/Generate")
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert "100000" in root.status.message.replace(",", "")


def test_what_the_environment_asks_and_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER is 'zipkin'"):
        tracing.set_up_tracing("dit", "dit-0")


def test_spans_that_nobody_wants_cost_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    begun = time.perf_counter()
    tracing.record("nothing", begun)
    tracing.set_up_tracing("dit", "dit-0")
    assert tracing.trace_metadata() == ()


def attributes(span: Span) -> dict[str, str | int]:
    return {
        each.key: each.value.string_value if each.value.HasField("string_value") else each.value.int_value
        for each in span.attributes
    }
