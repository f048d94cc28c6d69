"""OpenTelemetry traces of a request through the services. No torch here.

gRPC metadata carries the W3C trace context; each call and each stage has a span. `bagel.telemetry.otlp` reads
OpenTelemetry's environment variables, which say where spans go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.propagate import extract, inject
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

import bagel
from bagel.telemetry.otlp import exporter_name, resource

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Value = str | int | float | bool

tracer = trace.get_tracer("bagel", bagel.__version__)


def set_up_tracing(service: str, instance: str) -> None:
    """Export this process's spans as OpenTelemetry's environment variables say; by default, not at all.

    service and instance are like `dit` and `dit-0`, see `bagel.telemetry.otlp.resource`. Raises ConfigError.
    """
    exporter = _exporter()
    if exporter is None:
        return
    # Imported late: clients, which only pass contexts on, need not install the SDK.
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource(service, instance), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def _exporter() -> SpanExporter | None:
    """The exporter that OTEL_TRACES_EXPORTER names."""
    match exporter_name("traces"):
        case "console":
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter

            return ConsoleSpanExporter()
        case "otlp":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter()
    return None


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that makes a peer's spans children of the current one (W3C traceparent, tracestate, baggage)."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple(carrier.items())


@contextmanager
def serving(name: str, metadata: Mapping[str, str], **attributes: Value) -> Iterator[Span]:
    """The span of a call that this service handles: a child of the caller's span, and the parent of this task's spans.

    Only cancellation marks it as failed here. Code that turns an error into a status calls `record_failure` for it.
    """
    parent = extract(metadata)
    service, _, method = name.partition("/")
    span = tracer.start_span(
        name,
        parent,
        SpanKind.SERVER,
        {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, **attributes},
        record_exception=False,
        set_status_on_exception=False,
    )
    # Never detached: a call has its own task, and a stream's generator may end in another context than it began in.
    otel_context.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    except (asyncio.CancelledError, GeneratorExit) as error:
        record_failure(span, error)
        raise
    finally:
        span.end()


def record_failure(span: Span, error: BaseException, *, fault: bool = True) -> None:
    """Mark a span as failed, as refused, or as cancelled.

    fault: the failure is the service's own. By OpenTelemetry's conventions a caller's mistake is no error of a server's
    span, nor is a caller that left.
    """
    if not isinstance(error, Exception):
        span.set_attribute("bagel.cancelled", True)
    elif fault:
        span.set_status(Status(StatusCode.ERROR, str(error)))
        span.set_attribute("error.type", type(error).__name__)
    else:
        span.set_attribute("bagel.refused", str(error))


def annotate_request(**attributes: Value) -> None:
    """Add attributes to the span of the request that this task serves."""
    trace.get_current_span().set_attributes(attributes)


def record_request_failure(error: BaseException, *, fault: bool = True) -> None:
    """As `record_failure`, for the request that this task serves, if a framework made its span."""
    current = trace.get_current_span()
    if isinstance(error, Exception) and fault:  # as an event too: the framework records only the number of the status
        current.record_exception(error)
    record_failure(current, error, fault=fault)


@contextmanager
def span(name: str, **attributes: Value) -> Iterator[Span]:
    """A child of the current span for the block; the current span stays the same."""
    begun = tracer.start_span(name, attributes=attributes)
    try:
        yield begun
    except BaseException as error:
        record_failure(begun, error)
        raise
    finally:
        begun.end()


def record(name: str, begin: float, end: float | None = None, **attributes: Value) -> None:
    """Record a span for something that is over. begin, end: readings of time.perf_counter; by default it ends now."""
    # Spans have wall-clock times, so both ends are counted back from now.
    now, wall = time.perf_counter(), time.time_ns()
    at = [wall - int((now - moment) * 1e9) for moment in (begin, now if end is None else end)]
    tracer.start_span(name, attributes=attributes, start_time=at[0]).end(at[1])
