"""Metrics of all services at an OTLP receiver: each tells what it knows, and all of it adds up."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics as api

from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.errors import ConfigError, InvalidRequest
from bagel.events import Result
from bagel.telemetry import metrics
from tests.conftest import GOLDEN
from tests.helpers import sketch
from tests.otlp import Metrics, receiving

MODEL = GOLDEN / "checkpoint"
SMALL: dict[str, Any] = {"steps": 4, "height": 64, "width": 64}
EDIT = {"modality": "img2img", "image": sketch(), **SMALL}
GATEWAY, THINKER, DIT = "bagel-gateway", "bagel-thinker", "bagel-dit"
PAGE = Path(__file__).parents[2] / "docs/telemetry.md"
DOCUMENTED = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(), re.M)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_METRICS_EXPORTER"):
        monkeypatch.delenv(name, raising=False)


def served(topology: str, requests: Sequence[dict[str, Any]]) -> tuple[Metrics, list[Result]]:
    """What a receiver has got at the end of a deployment that served these requests one after another."""
    results = []
    with receiving() as (endpoint, _, received):
        env = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "500"}
        config = load_deploy_config(shipped_deploy_config(topology))
        with (
            Deployment(config, MODEL, device="cpu", env=env, http="127.0.0.1:0") as services,
            Client(services.address) as client,
        ):
            for request in requests:
                results.append(client.generate(**request))
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"http://{services.http}/v1/images/generations", b"{}", timeout=10)
            with pytest.raises(InvalidRequest):
                client.generate("too large", height=100_000)
    return received, results


@pytest.mark.slow
def test_two_stages_tell_what_they_did() -> None:
    picture = {"prompt": "a red circle", "seed": 1, **SMALL}
    edit = {"prompt": "make it blue", "seed": 2, **EDIT}
    thought = {"prompt": "a tree", "seed": 3, "think": True, "max_think_tokens": 5, **SMALL}
    got, results = served("bagel", [picture, {**picture, "seed": 4}, edit, {**edit, "seed": 5}, thought])
    usage = {name: sum(each.usage[name] for each in results) for name in results[0].usage}

    # K/V: what the Thinker sent, the DiT received; a second request of the same prompt moved nothing.
    sent = got.total(THINKER, "bagel.kv.sent")
    assert sent == got.total(DIT, "bagel.kv.received") == got.total(GATEWAY, "bagel.kv.pulled") == usage["pulled_bytes"]
    assert results[1].usage["pulled_bytes"] == results[3].usage["pulled_bytes"] == 0
    assert results[1].usage["kv_reused_bytes"] == results[0].usage["pulled_bytes"]
    assert got.total(THINKER, "bagel.kv.reused") > 0 and got.total(DIT, "bagel.kv.reused") > 0

    # Steps and batches.
    assert got.total(GATEWAY, "bagel.steps") == usage["steps"] == 15
    assert got.count(DIT, "bagel.step.duration", bagel_step_kind="picture") == 15
    assert got.total(DIT, "bagel.batch.size", bagel_step_kind="picture") == 15
    assert got.count(THINKER, "bagel.step.duration", bagel_step_kind="text") == usage["think_tokens"] == 5

    # Firsts, ends and errors.
    assert got.count(GATEWAY, "gen_ai.server.time_to_first_token") == 1
    assert got.count(GATEWAY, "bagel.time_to_first_step") == 5
    assert got.count(GATEWAY, "gen_ai.server.request.duration") == 5
    assert got.total(GATEWAY, "bagel.requests", rpc_response_status_code="OK") == 5
    assert got.total(GATEWAY, "bagel.requests", rpc_response_status_code="INVALID_ARGUMENT") == 1
    calls = {"rpc_method": "bagel.v1.GatewayService/Generate"}
    assert got.count(GATEWAY, "rpc.server.call.duration", rpc_response_status_code="INVALID_ARGUMENT", **calls) == 1
    assert got.count(GATEWAY, "rpc.server.call.duration", rpc_response_status_code="OK", **calls) == 5
    drawn = {"rpc_method": "bagel.v1.DitService/Generate", "rpc_response_status_code": "OK"}
    assert got.count(DIT, "rpc.server.call.duration", **drawn) == 5

    asked: dict[str, str | int] = {"http_route": "/v1/images/generations", "http_response_status_code": 415}
    assert got.count(GATEWAY, "http.server.request.duration", **asked) == 1

    # At the end nothing waits, and the page lists what there is.
    for service in (GATEWAY, THINKER, DIT):
        assert got.total(service, "bagel.queue.depth") == got.total(service, "bagel.requests.active") == 0
    told = {(service, name) for service, name in got.latest}
    assert told == {(f"bagel-{each.lower()}", name) for name, _, _, of in DOCUMENTED for each in of.split(", ")}
    assert {name: got.latest[service, name].unit for service, name in told} == {
        name: unit.strip("` ") for name, unit, _, _ in DOCUMENTED
    }


@pytest.mark.slow
def test_a_single_stage_tells_of_its_runner() -> None:
    thought = {"prompt": "a tree", "seed": 3, "think": True, "max_think_tokens": 5, **SMALL}
    got, _ = served("bagel_single_stage", [thought])
    assert got.count(DIT, "bagel.step.duration", bagel_step_kind="picture") == 3
    assert got.count(DIT, "bagel.step.duration", bagel_step_kind="text") == 5
    assert (DIT, "bagel.kv.sent") not in got.latest  # it has no store


@pytest.mark.parametrize(("variable", "value"), [("OTEL_METRICS_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true")])
def test_what_is_turned_off_is_not_told(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = api.get_meter_provider()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    metrics.set_up_metrics("dit", "dit-0")
    assert api.get_meter_provider() is before


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("OTEL_METRICS_EXPORTER", "prometheus", "can be scraped without it"),
        ("OTEL_METRICS_EXPORTER", "statsd", "OTEL_METRICS_EXPORTER is 'statsd'"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon", "OTEL_METRIC_EXPORT_INTERVAL is 'soon'"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "0", "OTEL_METRIC_EXPORT_TIMEOUT is '0'"),
    ],
)
def test_what_the_environment_asks_and_cannot_be_is_told(
    variable: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=told):
        metrics.set_up_metrics("dit", "dit-0")


def test_metrics_that_nobody_wants_make_no_provider() -> None:
    before = api.get_meter_provider()
    metrics.set_up_metrics("dit", "dit-0")
    assert api.get_meter_provider() is before
    assert type(before).__module__.startswith("opentelemetry.metrics")  # of the API alone, which records nothing
