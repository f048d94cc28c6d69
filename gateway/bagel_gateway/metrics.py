"""Counters of the gateway, in Prometheus' text format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bagel import wire
from bagel.errors import BagelError, InvalidRequest
from bagel.request import Modality
from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.admission import Admission
from bagel_gateway.backends import Backend, Backends

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
"""Seconds: from one step of a small model to a large picture that thinks first."""
_TOKENS = ("prompt_tokens", "image_tokens", "completion_tokens", "think_tokens", "computed_tokens", "reused_tokens")

Seen = Callable[[gateway_pb2.GenerateResponse], None]


class Metrics:
    """What an operator watches: requests by their end, their durations by stage, tokens, bytes, and the backends."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        counter, histogram = _makers(registry)
        self._requests = counter("bagel_requests", "Requests that have ended, by gRPC status.", "modality", "status")
        self._seconds = histogram("bagel_request_seconds", "From admission to the end, of those served.", "modality")
        self._first = histogram("bagel_first_seconds", "Until the first of a request's texts or steps.", "kind")
        self._stages = histogram("bagel_stage_seconds", "Time in a stage, as the services measure it.", "stage")
        self._tokens = counter("bagel_tokens", "Tokens by the names of bagel.v1.Usage.", "kind")
        self._pulled = counter("bagel_kv_pulled_bytes", "K/V that DiTs pulled.")
        self._steps = counter("bagel_steps", "Euler steps.")
        self._http = counter("bagel_http_requests", "HTTP requests by route and status code.", "route", "code")

    def watch(self, admission: Admission, backends: Backends) -> None:
        """Show what is under way now, and which services are ready."""
        gauge = Gauge("bagel_requests_under_way", "Requests that have a place.", registry=self._registry)
        gauge.set_function(lambda: admission.under_way)
        waiting = Gauge("bagel_requests_waiting", "Requests that wait for a place.", registry=self._registry)
        waiting.set_function(lambda: admission.waiting)
        ready = Gauge("bagel_backend_ready", "1 if the service is ready.", ["backend"], registry=self._registry)
        busy = Gauge(
            "bagel_backend_requests", "Requests of this gateway at the service.", ["backend"], registry=self._registry
        )
        for each in (*backends.thinkers, *backends.dits):
            ready.labels(each.name).set_function(partial(_is_ready, each))
            busy.labels(each.name).set_function(partial(_under_way, each))

    def text(self) -> bytes:
        """All of them, to be scraped."""
        return generate_latest(self._registry)

    def http(self, route: str, code: int) -> None:
        """Count an HTTP request."""
        self._http.labels(route, str(code)).inc()

    @contextmanager
    def request(self, modality: common_pb2.Modality.ValueType) -> Iterator[Seen]:
        """Count a request for the block, which tells of every event."""
        try:
            named = str(wire.modality_from_wire(modality))
        except InvalidRequest:
            named = "none"
        with self._counted(named) as seen:
            yield seen

    @contextmanager
    def request_of(self, modality: Modality) -> Iterator[Seen]:
        """As `request`, of a modality that is known."""
        with self._counted(str(modality)) as seen:
            yield seen

    @contextmanager
    def _counted(self, modality: str) -> Iterator[Seen]:
        began, firsts, status = time.perf_counter(), set[str](), "OK"

        def seen(event: gateway_pb2.GenerateResponse) -> None:
            kind = event.WhichOneof("event") or ""
            if kind in ("text", "step") and kind not in firsts:
                firsts.add(kind)
                self._first.labels(kind).observe(time.perf_counter() - began)
            if kind == "finished":
                self._finished(event.finished)

        try:
            yield seen
        except BagelError as error:
            status = error.grpc_status
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = "CANCELLED"
            raise
        except BaseException:
            status = "INTERNAL"
            raise
        finally:
            self._requests.labels(modality, status).inc()
            if status == "OK":
                self._seconds.labels(modality).observe(time.perf_counter() - began)

    def _finished(self, finished: gateway_pb2.Finished) -> None:
        for timing in finished.timings:
            self._stages.labels(timing.stage).observe(timing.seconds)
        for kind in _TOKENS:
            self._tokens.labels(kind.removesuffix("_tokens")).inc(getattr(finished.usage, kind))
        self._pulled.inc(finished.usage.pulled_bytes)
        self._steps.inc(finished.usage.steps)


def _is_ready(backend: Backend) -> float:
    return float(backend.model is not None)


def _under_way(backend: Backend) -> float:
    return backend.under_way


def _makers(registry: CollectorRegistry) -> tuple[Callable[..., Counter], Callable[..., Histogram]]:
    def counter(name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=registry)

    def histogram(name: str, about: str, *labels: str) -> Histogram:
        return Histogram(name, about, labels, buckets=BUCKETS, registry=registry)

    return counter, histogram
