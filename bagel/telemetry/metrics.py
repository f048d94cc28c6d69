"""OpenTelemetry metrics: their export, and the instruments that several services share. No torch here.

Names follow OpenTelemetry's semantic conventions where they exist; the others are `bagel.…` with UCUM units.
docs/telemetry.md lists them all. Without an exporter, recording a value does nothing.
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
from bagel.errors import SERVER_FAULTS, ConfigError
from bagel.telemetry.otlp import exporter_name, resource

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter

Attributes = Mapping[str, str | int]
Reading = Callable[[], Iterable[tuple[float, Attributes]]]
"""Returns the current values, each with its attributes."""

# From one step of a small model on a GPU to a large picture that thinks first.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
COUNTED_OF_A_STORE = {
    "computed": ("By", "K/V computed here"),
    "reused": ("By", "K/V that a request needed and that were already stored or being computed"),
    "sent": ("By", "K/V sent to peers"),
    "received": ("By", "K/V pulled from peers"),
}
"""Counters of a K/V store, in bytes; `bagel.kv.counters.KvStats` calls them …_bytes."""
HELD_BY_A_STORE = {
    "held": ("By", "K/V that leases keep", "held_bytes"),
    "stored": ("By", "K/V in the store, including those without a lease", "stored_bytes"),
    "limit": ("By", "K/V that the store may hold", "capacity_bytes"),
    "leases": ("{lease}", "Active leases", "leases"),
    "pulls": ("{pull}", "Pulls in progress, sent or received", "pulls"),
}
"""The current contents of a K/V store, with the fields of `bagel.kv.counters.KvStats` that give them."""

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
    """Export this process's metrics as OpenTelemetry's environment variables say; by default, not at all.

    service and instance are like `dit` and `dit-0`, see `bagel.telemetry.otlp.resource`. Raises ConfigError.
    """
    exporter = _exporter()
    if exporter is None:
        return
    # Imported late: only a process that exports needs the SDK.
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    times = (_milliseconds("OTEL_METRIC_EXPORT_INTERVAL"), _milliseconds("OTEL_METRIC_EXPORT_TIMEOUT"))
    reader = PeriodicExportingMetricReader(exporter, *times)
    # Not at exit: `otlp.shut_down` does it, also in a process that skips Python's exit handlers.
    provider = MeterProvider([reader], resource=resource(service, instance), shutdown_on_exit=False)
    metrics.set_meter_provider(provider)


class Call:
    """A call that is being served. status: its outcome, the name of a grpc.StatusCode."""

    status = "OK"


@contextmanager
def timed_call(method: str) -> Iterator[Call]:
    """Record the duration and the status of a call; the code that turns an error into a status sets `Call.status`.

    method: the full name, like `bagel.v1.DitService/Generate`.
    """
    call, began = Call(), time.perf_counter()
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.status = "CANCELLED"
        raise
    finally:
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": call.status}
        if call.status in SERVER_FAULTS:
            attributes["error.type"] = call.status
        _calls.record(time.perf_counter() - began, attributes)


def count_step(kind: str, requests: int, seconds: float) -> None:
    """Record a step: the number of requests that it served and its duration. kind: picture or text."""
    attributes = {"bagel.step.kind": kind}
    _batches.record(requests, attributes)
    _steps.record(seconds, attributes)


def watch_queue(waiting: Callable[[], int], active: Callable[[], int]) -> None:
    """Export how many requests wait for a place in a service, and how many have one."""
    watch("bagel.queue.depth", "{request}", "Requests that wait for a place", lambda: [(waiting(), {})])
    watch("bagel.requests.active", "{request}", "Requests that have a place", lambda: [(active(), {})])


def watch_store(stats: Callable[[], Mapping[str, int]]) -> None:
    """Export what a K/V store has moved, and what it holds."""

    def read(field: str) -> Reading:
        return lambda: [(stats()[field], {})]

    for name, (unit, about) in COUNTED_OF_A_STORE.items():
        watch(f"bagel.kv.{name}", unit, about, read(f"{name}_bytes"), counts=True)
    watch("bagel.kv.retries", "{page}", "Pages asked for once more", read("retried_pages"), counts=True)
    for name, (unit, about, field) in HELD_BY_A_STORE.items():
        watch(f"bagel.kv.{name}", unit, about, read(field))


def watch(name: str, unit: str, about: str, read: Reading, *, counts: bool = False) -> None:
    """Export the values of `read`: with counts=True as a counter that only grows, else as a sum that may fall."""

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
    """The value of a variable; None, which means the SDK's default, if it is not set."""
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
