"""What a gateway measures, for Prometheus at /metrics and for OpenTelemetry's export."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from bagel.errors import BagelError
from bagel.v1 import gateway_pb2
from bagel_gateway.backend import Backend
from bagel_gateway.backends import Backends
from bagel_gateway.instruments import Exported, Instruments
from bagel_gateway.places import Places

_TOKENS = ("prompt_tokens", "image_tokens", "completion_tokens", "think_tokens", "computed_tokens", "reused_tokens")
_GEN_AI = {"gen_ai.operation.name": "generate_content", "gen_ai.provider.name": "bagel-serving"}
"""Attributes that OpenTelemetry's conventions require of every gen_ai metric."""

Seen = Callable[[gateway_pb2.GenerateResponse], None]


class Metrics:
    """Requests by their end, their durations by stage, tokens, bytes, and the backends."""

    def __init__(self) -> None:
        # A registry of its own: the global one would refuse a second gateway in the same process.
        self._registry = CollectorRegistry()
        self._instruments = make = Instruments(self._registry)
        self._requests = make.counter(
            "bagel_requests",
            "Requests that have ended, by gRPC status",
            ("modality", "status"),
            Exported("bagel.requests", "{request}", ("bagel.modality", "rpc.response.status_code")),
        )
        self._seconds = make.histogram(
            "bagel_request_seconds",
            "From admission to the end, of those served",
            ("modality",),
            Exported("gen_ai.server.request.duration", "s", ("bagel.modality",), _GEN_AI),
        )
        self._first = make.histograms(
            "bagel_first_seconds",
            "Until the first of a request's texts or steps",
            "kind",
            {
                "text": Exported("gen_ai.server.time_to_first_token", "s", always=_GEN_AI),
                "step": Exported("bagel.time_to_first_step", "s"),
            },
        )
        self._stages = make.histogram(
            "bagel_stage_seconds",
            "Time in a stage, as the services measure it",
            ("stage",),
            Exported("bagel.stage.duration", "s", ("bagel.stage",)),
        )
        self._tokens = make.counter(
            "bagel_tokens",
            "Tokens by the names of bagel.v1.Usage",
            ("kind",),
            Exported("bagel.tokens", "{token}", ("bagel.token.kind",)),
        )
        self._pulled = make.counter(
            "bagel_kv_pulled_bytes", "K/V that DiTs pulled", (), Exported("bagel.kv.pulled", "By")
        )
        self._steps = make.counter("bagel_steps", "Euler steps", (), Exported("bagel.steps", "{step}"))
        # Scraped alone: FastAPI itself gives OpenTelemetry http.server.request.duration, by route and status code.
        self._http = prometheus_client.Counter(
            "bagel_http_requests", "HTTP requests by route and status code.", ["route", "code"], registry=self._registry
        )

    def watch(self, places: Places, backends: Backends) -> None:
        """Show what is under way now, and which services are ready."""
        gauge, services = self._instruments.gauge, (*backends.thinkers, *backends.dits)
        gauge(
            "bagel_requests_under_way",
            "Requests that have a place",
            (),
            Exported("bagel.requests.active", "{request}"),
            {"": lambda: places.under_way},
        )
        gauge(
            "bagel_requests_waiting",
            "Requests that wait for a place",
            (),
            Exported("bagel.queue.depth", "{request}"),
            {"": lambda: places.waiting},
        )
        gauge(
            "bagel_backend_ready",
            "1 if the service is ready",
            ("backend",),
            Exported("bagel.backend.ready", "{backend}", ("bagel.backend",)),
            {each.name: partial(_is_ready, each) for each in services},
        )
        gauge(
            "bagel_backend_requests",
            "Requests of this gateway at the service",
            ("backend",),
            Exported("bagel.backend.requests", "{request}", ("bagel.backend",)),
            {each.name: partial(_under_way, each) for each in services},
        )

    def text(self) -> bytes:
        """All metrics as Prometheus text."""
        return generate_latest(self._registry)

    def http(self, route: str, code: int) -> None:
        """Count an HTTP request."""
        self._http.labels(route, str(code)).inc()

    @contextmanager
    def request(self, modality: str) -> Iterator[Seen]:
        """Count a request for the block, which passes in every event."""
        began, firsts, status = time.perf_counter(), set[str](), "OK"

        def seen(event: gateway_pb2.GenerateResponse) -> None:
            kind = event.WhichOneof("event") or ""
            if kind in ("text", "step") and kind not in firsts:
                firsts.add(kind)
                self._first[kind].record(time.perf_counter() - began)
            if kind == "finished":
                self._finished(event.finished)

        try:
            yield seen
        except BagelError as error:
            status = error.grpc_status
            raise
        # A client that leaves cancels the task, or closes the generator.
        except (asyncio.CancelledError, GeneratorExit):
            status = "CANCELLED"
            raise
        except BaseException:
            status = "INTERNAL"
            raise
        finally:
            self._requests.add(1, modality, status)
            if status == "OK":
                self._seconds.record(time.perf_counter() - began, modality)

    def _finished(self, finished: gateway_pb2.Finished) -> None:
        for timing in finished.timings:
            self._stages.record(timing.seconds, timing.stage)
        for kind in _TOKENS:
            self._tokens.add(getattr(finished.usage, kind), kind.removesuffix("_tokens"))
        self._pulled.add(finished.usage.pulled_bytes)
        self._steps.add(finished.usage.steps)


def _is_ready(backend: Backend) -> int:
    return int(backend.model is not None)


def _under_way(backend: Backend) -> int:
    return backend.under_way
