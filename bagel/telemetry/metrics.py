"""OpenTelemetry metrics of a service: their export, and the instruments that several services have.

Named after OpenTelemetry's semantic conventions where there are any, else `bagel.…` with UCUM units; docs/telemetry.md
lists them all. Without an exporter every recording is a call of the API that does nothing. No torch here.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

import bagel
from bagel.errors import ConfigError
from bagel.telemetry.otlp import exporter_name, resource

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter

    from bagel.kv.segment import KvStats

Attributes = Mapping[str, str | int]
Reading = Callable[[], Iterable[tuple[float, Attributes]]]
"""Values now, each with its attributes."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
"""From a step of a small model on a GPU to a large picture that thinks first."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
COUNTED_OF_A_STORE = {
    "computed": ("By", "K/V computed here"),
    "reused": ("By", "K/V that were wanted and were there already, or were being made"),
    "sent": ("By", "K/V sent to peers"),
    "received": ("By", "K/V pulled from peers"),
}
"""Counters of a K/V store in bytes; `bagel.kv.segment.KvStats` has each as …_bytes."""
HELD_BY_A_STORE = {
    "held": ("By", "K/V that leases keep", "held_bytes"),
    "stored": ("By", "K/V in the store, those without a lease included", "stored_bytes"),
    "limit": ("By", "K/V that the store may take", "capacity_bytes"),
    "leases": ("{lease}", "Leases that run", "leases"),
    "pulls": ("{pull}", "Pulls under way, sent or received", "pulls"),
}
"""What a K/V store holds now, by the fields of `bagel.kv.segment.KvStats`."""

meter = metrics.get_meter("bagel", bagel.__version__)
_calls = meter.create_histogram(
    "rpc.server.call.duration", "s", "Calls served, by status", explicit_bucket_boundaries_advisory=SECONDS
)
_batches = meter.create_histogram(
    "bagel.batch.size", "{request}", "Requests that one step served", explicit_bucket_boundaries_advisory=SIZES
)
_steps = meter.create_histogram(
    "bagel.step.duration", "s", "Steps of a batch", explicit_bucket_boundaries_advisory=SECONDS
)


def set_up_metrics(service: str, instance: str) -> None:
    """Export this process's metrics as the environment says; nothing if it says nothing. Raises ConfigError.

    service, instance: `bagel-dit` and `dit-0`; see `bagel.otlp.resource`.
    """
    exporter = _exporter()
    if exporter is None:
        return
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    times = (_milliseconds("OTEL_METRIC_EXPORT_INTERVAL"), _milliseconds("OTEL_METRIC_EXPORT_TIMEOUT"))
    reader = PeriodicExportingMetricReader(exporter, *times)
    provider = MeterProvider([reader], resource=resource(service, instance), shutdown_on_exit=False)
    metrics.set_meter_provider(provider)


class Call:
    """A call that is served. status: how it ended, a member of grpc.StatusCode."""

    status = "OK"


@contextmanager
def timed_call(method: str) -> Iterator[Call]:
    """Count a call for the block; who turns errors into a status sets it.

    method: fully qualified, `bagel.v1.DitService/Generate`.
    """
    call, began = Call(), time.perf_counter()
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.status = "CANCELLED"
        raise
    finally:
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": call.status}
        if call.status != "OK":
            attributes["error.type"] = call.status
        _calls.record(time.perf_counter() - began, attributes)


def count_step(kind: str, requests: int, seconds: float) -> None:
    """A step served so many requests, and took so long. kind: picture or text."""
    attributes = {"bagel.step.kind": kind}
    _batches.record(requests, attributes)
    _steps.record(seconds, attributes)


def watch_queue(waiting: Callable[[], int], active: Callable[[], int]) -> None:
    """Show how many requests wait for a place in a service, and how many have one."""
    watch("bagel.queue.depth", "{request}", "Requests that wait for a place", lambda: [(waiting(), {})])
    watch("bagel.requests.active", "{request}", "Requests that have a place", lambda: [(active(), {})])


def watch_store(stats: Callable[[], KvStats]) -> None:
    """Show what a K/V store has moved, and what it holds."""

    def read(field: str) -> Reading:
        return lambda: [(getattr(stats(), field), {})]

    for name, (unit, about) in COUNTED_OF_A_STORE.items():
        watch(f"bagel.kv.{name}", unit, about, read(f"{name}_bytes"), counts=True)
    watch("bagel.kv.retries", "{page}", "Pages asked for once more", read("retried_pages"), counts=True)
    for name, (unit, about, field) in HELD_BY_A_STORE.items():
        watch(f"bagel.kv.{name}", unit, about, read(field))


def watch(name: str, unit: str, about: str, read: Reading, *, counts: bool = False) -> None:
    """Show what `read` gives whenever metrics are exported: a sum that may go down, or one that counts up."""

    def observe(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, attributes) for value, attributes in read()]

    create = meter.create_observable_counter if counts else meter.create_observable_up_down_counter
    create(name, [observe], unit, about)


def _exporter() -> MetricExporter | None:
    """The exporter that OTEL_METRICS_EXPORTER names."""
    match exporter_name("metrics"):
        case "console":
            from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

            return ConsoleMetricExporter()
        case "otlp":
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

            return OTLPMetricExporter()
    return None


def _milliseconds(variable: str) -> float | None:
    """What a variable says; None where it says nothing, for the SDK's default."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{variable} is {text!r}; it must be milliseconds above 0, like 60000")
    return value
