"""An OTLP receiver on loopback: a real gRPC server that keeps the exported spans and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint, Metric, NumberDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Attributes = Mapping[str, str | int]


class Traces(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps all spans as (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [(_service(resource.resource), span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, service: str, name: str) -> list[Span]:
        return [span for sender, span in self.spans if sender == service and span.name == name]


@dataclass(frozen=True)
class Point:
    """The latest value of a metric for some attributes; for a histogram, its sum and count."""

    attributes: Attributes
    value: float
    count: int = 0


class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the latest export of each metric of each service."""

    def __init__(self) -> None:
        self.latest: dict[tuple[str, str], Metric] = {}

    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.latest |= {(_service(resource.resource), metric.name): metric for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def points(self, service: str, name: str) -> list[Point]:
        """The points of a metric; KeyError if it was never exported."""
        metric = self.latest[service, name]
        points: list[NumberDataPoint | HistogramDataPoint] = [*metric.sum.data_points, *metric.histogram.data_points]
        return [_point(each) for each in points]

    def total(self, service: str, name: str, **attributes: str | int) -> float:
        """The sum of a metric over all points with these attributes, in whose names _ stands for a dot."""
        return sum(point.value for point in self._of(service, name, attributes))

    def count(self, service: str, name: str, **attributes: str | int) -> int:
        """Like `total`, for the number of values in a histogram."""
        return sum(point.count for point in self._of(service, name, attributes))

    def _of(self, service: str, name: str, attributes: Attributes) -> list[Point]:
        wanted = attributes.items()
        points = [({k.replace(".", "_"): v for k, v in p.attributes.items()}, p) for p in self.points(service, name)]
        return [point for named, point in points if wanted <= named.items()]


@contextmanager
def receiving() -> Iterator[tuple[str, Traces, Metrics]]:
    """Run a receiver; yields its endpoint, its traces and its metrics."""
    server, traces, metrics = grpc.server(ThreadPoolExecutor(2)), Traces(), Metrics()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(traces, server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(metrics, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", traces, metrics
    finally:
        server.stop(None)


def attributes(pairs: Iterable[KeyValue]) -> dict[str, str | int]:
    """Read attributes whose values are texts or whole numbers."""
    return {
        each.key: each.value.string_value if each.value.HasField("string_value") else each.value.int_value
        for each in pairs
    }


def _service(resource: Resource) -> str:
    return str(attributes(resource.attributes)["service.name"])


def _point(point: NumberDataPoint | HistogramDataPoint) -> Point:
    named = attributes(point.attributes)
    if isinstance(point, HistogramDataPoint):
        return Point(named, point.sum, point.count)
    return Point(named, point.as_int if point.HasField("as_int") else point.as_double)
