"""Instruments that are recorded once and read twice: scraped as Prometheus text, and exported by OpenTelemetry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge

from bagel.telemetry import metrics


@dataclass(frozen=True)
class Exported:
    """How OpenTelemetry knows an instrument.

    labels: its attributes, in the order of Prometheus' labels; always: attributes that Prometheus does not have.
    """

    name: str
    unit: str
    labels: tuple[str, ...] = ()
    always: Mapping[str, str] = field(default_factory=dict)

    def attributes(self, values: Iterable[str | int]) -> dict[str, str | int]:
        """The attributes of these values of the labels."""
        return {**self.always, **dict(zip(self.labels, values, strict=True))}


class Counter:
    """Counts up."""

    def __init__(self, scraped: prometheus_client.Counter, exported: Exported, about: str) -> None:
        self._scraped, self._as = scraped, exported
        self._exported = metrics.meter.create_counter(exported.name, exported.unit, about)

    def add(self, amount: int, *values: str | int) -> None:
        """Add to the count under these values of the labels."""
        (self._scraped.labels(*values) if values else self._scraped).inc(amount)
        self._exported.add(amount, self._as.attributes(values))


class Histogram:
    """Keeps a distribution of seconds."""

    def __init__(self, scraped: prometheus_client.Histogram, exported: Exported, about: str) -> None:
        self._scraped, self._as = scraped, exported
        # The same buckets as those of Prometheus, so that both show the same.
        self._exported = metrics.meter.create_histogram(
            exported.name, exported.unit, about, explicit_bucket_boundaries_advisory=metrics.SECONDS
        )

    def record(self, seconds: float, *values: str | int) -> None:
        """Record a duration under these values of the labels."""
        (self._scraped.labels(*values) if values else self._scraped).observe(seconds)
        self._exported.record(seconds, self._as.attributes(values))


class Instruments:
    """Makes them. Every Prometheus metric is in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, about: str, labels: tuple[str, ...], exported: Exported) -> Counter:
        """A counter; Prometheus adds _total to its name."""
        scraped = prometheus_client.Counter(name, f"{about}.", labels, registry=self._registry)
        return Counter(scraped, exported, about)

    def histogram(self, name: str, about: str, labels: tuple[str, ...], exported: Exported) -> Histogram:
        """A histogram of seconds."""
        return Histogram(self._scraped(name, about, labels), exported, about)

    def histograms(self, name: str, about: str, label: str, each: Mapping[str, Exported]) -> dict[str, Histogram]:
        """A histogram for each value of a label; OpenTelemetry has a name for each."""
        scraped = self._scraped(name, about, (label,))
        return {value: Histogram(scraped.labels(value), exported, about) for value, exported in each.items()}

    def gauge(
        self, name: str, about: str, labels: tuple[str, ...], exported: Exported, read: Mapping[str, Callable[[], int]]
    ) -> None:
        """A gauge that is read when it is asked for. read: by the value of its label, "" if it has no label."""
        gauge = Gauge(name, f"{about}.", labels, registry=self._registry)
        for value, reading in read.items():
            (gauge.labels(value) if labels else gauge).set_function(reading)
        metrics.watch(
            exported.name,
            exported.unit,
            about,
            lambda: [(reading(), exported.attributes((value,) * len(labels))) for value, reading in read.items()],
        )

    def _scraped(self, name: str, about: str, labels: tuple[str, ...]) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(name, f"{about}.", labels, registry=self._registry, buckets=metrics.SECONDS)
