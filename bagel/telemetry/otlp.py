"""Choose where traces and metrics go, by OpenTelemetry's own environment variables. No torch here.

A signal is exported over OTLP once OTEL_EXPORTER_OTLP_ENDPOINT (or the signal's own, like
OTEL_EXPORTER_OTLP_METRICS_ENDPOINT) is set, or its OTEL_…_EXPORTER is otlp or console.
"""

from __future__ import annotations

import os
import time
from threading import Thread
from typing import TYPE_CHECKING, Literal

from opentelemetry import metrics, trace

import bagel
from bagel.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

Signal = Literal["traces", "metrics"]
LAST_EXPORT_S = 2.0
"""Seconds that a process waits at its end for the last export."""


def exporter_name(signal: Signal) -> str:
    """The exporter that OTEL_…_EXPORTER names: otlp, console or none. Without a name, otlp if an endpoint is set.

    Raises ConfigError for any other exporter, and for any protocol but gRPC.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    name = os.environ.get(variable, "").strip() or ("otlp" if _of_otlp(signal, "ENDPOINT") else "none")
    if name not in ("otlp", "console", "none"):
        raise ConfigError(f"{variable} is {name!r}; otlp, console and none are supported{_instead(name)}")
    protocol = _of_otlp(signal, "PROTOCOL") or "grpc"
    if name == "otlp" and protocol != "grpc":
        raise ConfigError(f"the OTLP protocol is {protocol!r}; set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, the supported one")
    return name


def resource(service: str, instance: str) -> Resource:
    """How this process presents itself to a collector: `bagel-dit`, `dit-0`, unless OTEL_SERVICE_NAME or
    OTEL_RESOURCE_ATTRIBUTES say otherwise.
    """
    from opentelemetry.sdk.resources import Resource

    ours = {"service.name": f"bagel-{service}", "service.instance.id": instance, "service.version": bagel.__version__}
    # Arguments would override the user's variables; unknown_service is the SDK's own placeholder.
    given = Resource.create().attributes
    return Resource.create(
        {key: value for key, value in ours.items() if key not in given or "unknown_service" in str(given[key])}
    )


def shut_down() -> None:
    """Export what is still waiting, traces and metrics at once.

    It gives up after LAST_EXPORT_S, as the collector may be gone. Call it at the end of a process, also of one that
    skips Python's exit handlers.
    """
    providers = (trace.get_tracer_provider(), metrics.get_meter_provider())
    # Without an exporter the API's providers have no shutdown.
    stops = [stop for each in providers if (stop := getattr(each, "shutdown", None)) is not None]
    # Daemons, so that an export that still waits does not hold up the process's end.
    threads = [Thread(target=stop, name="last export", daemon=True) for stop in stops]
    deadline = time.monotonic() + LAST_EXPORT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _of_otlp(signal: Signal, what: str) -> str | None:
    """A variable of the OTLP exporter: the signal's own, else the one for all signals."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{what}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{what}")


def _instead(name: str) -> str:
    return "; the gateway's /metrics can be scraped without it" if name == "prometheus" else ""
