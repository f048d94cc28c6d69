"""One request is one trace: its spans are told to an OTLP receiver, from every service that it went through."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

import bagel
from bagel import tracing
from bagel.config import shipped_deploy_config
from bagel.errors import ConfigError
from tests.conftest import GOLDEN
from tests.otlp import Traces, attributes, receiving

MODEL = GOLDEN / "checkpoint"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    with receiving() as (endpoint, traces, _):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield traces


@pytest.mark.slow
def test_a_picture_is_one_trace_through_all_services(receiver: Traces) -> None:
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
    pulled = [attributes(iter(span.attributes)) for span in receiver.named("bagel-dit", "kv pull")]
    assert sum(int(each["bytes"]) for each in pulled) > 0
    windows = [attributes(iter(span.attributes)) for span in receiver.named("bagel-dit", "denoise")]
    assert [(each["first_step"], each["last_step"]) for each in windows] == [(1, 10), (11, 11)]
    assert len(receiver.named("bagel-dit", "decode")) == 1


@pytest.mark.slow
def test_a_refused_request_is_a_failed_span(receiver: Traces) -> None:
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
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    begun = time.perf_counter()
    tracing.record("nothing", begun)
    tracing.set_up_tracing("dit", "dit-0")
    assert tracing.trace_metadata() == ()
