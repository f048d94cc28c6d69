"""--log-stats: where the time of each request went, and the mean and percentiles of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles

from bagel.client.tables import LABEL_CHARACTERS, NOTHING, aligned, short
from bagel.events import Accepted, Result, ServiceEvent, StepDone, TextDelta
from bagel.prompts import prompt_text
from bagel.request import Request


@dataclass
class Firsts:
    """Hears a run's events: when the first text and the first step of each request came.

    In seconds since the gateway accepted it, in one process since the run began.
    """

    text: dict[int, float] = field(default_factory=dict)
    step: dict[int, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter
    _accepted: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def __call__(self, event: ServiceEvent) -> None:
        """Take one event in."""
        now = self.clock()
        match event:
            case Accepted():
                self._accepted[event.index] = now
            case TextDelta() if event.index not in self.text:
                self.text[event.index] = now - self._accepted.get(event.index, self._began)
            case StepDone() if event.index not in self.step:
                self.step[event.index] = now - self._accepted.get(event.index, self._began)


@dataclass(frozen=True)
class _Row:
    """One request: what it asked, what it came to, and its firsts."""

    request: Request
    result: Result
    first_text: float | None
    first_step: float | None

    def stage(self, name: str) -> float | None:
        return self.result.timings.get(name)

    def used(self, name: str) -> float | None:
        """A count of bytes that only what came through services has."""
        return self.result.usage.get(name) if "transfer" in self.result.timings else None

    @property
    def tokens(self) -> int | None:
        return len(self.result.token_ids) or None

    @property
    def tokens_per_s(self) -> float | None:
        seconds = self.stage("text")
        return self.tokens / seconds if self.tokens and seconds else None

    @property
    def steps(self) -> int | None:
        if self.result.image is None:
            return None
        # n timesteps are n - 1 Euler steps.
        return self.result.usage.get("steps", self.request.image.steps - 1)

    @property
    def ms_per_step(self) -> float | None:
        seconds = self.stage("denoise")
        return 1e3 * seconds / self.steps if self.steps and seconds is not None else None

    @property
    def total(self) -> float:
        return self.result.timings.get("total", sum(self.result.timings.values()))


@dataclass(frozen=True)
class _Column:
    """A figure of each request, and how it is written."""

    title: str
    value: Callable[[_Row], float | None]
    written: Callable[[float], str]


def stats_table(requests: Sequence[Request], results: Sequence[Result], firsts: Firsts) -> str:
    """The table of --log-stats; figures that no request has are left out."""
    rows = [
        _Row(request, result, firsts.text.get(result.index), firsts.step.get(result.index))
        for request, result in zip(requests, results, strict=True)
    ]
    columns = [column for column in _COLUMNS if any(column.value(row) is not None for row in rows)]
    lines = [["request", *(column.title for column in columns), "prompt"]]
    for number, row in enumerate(rows, 1):
        cells = (_cell(column, column.value(row)) for column in columns)
        lines.append([str(number), *cells, short(prompt_text(row.request.prompt), LABEL_CHARACTERS)])
    if len(rows) > 1:
        lines += [[name, *(_summary(column, rows, of) for column in columns), ""] for name, of in _SUMMARIES.items()]
    return aligned(lines, left=(len(columns) + 1,))


def _summary(column: _Column, rows: Sequence[_Row], of: Callable[[Sequence[float]], float]) -> str:
    return _cell(column, of([value for row in rows if (value := column.value(row)) is not None]))


def _cell(column: _Column, value: float | None) -> str:
    return NOTHING if value is None else column.written(value)


def _percentile(number: int) -> Callable[[Sequence[float]], float]:
    """A percentile, interpolated between two values."""
    # quantiles needs two values, so a single one is given twice.
    return lambda values: quantiles([*values] * (1 + (len(values) == 1)), n=100, method="inclusive")[number - 1]


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _tenths(value: float) -> str:
    return f"{value:.1f}"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.2f}"


_COLUMNS = (
    _Column("queue s", lambda row: row.stage("queue"), _seconds),
    _Column("prefill s", lambda row: row.stage("context"), _seconds),
    _Column("K/V s", lambda row: row.stage("transfer"), _seconds),
    _Column("pulled MiB", lambda row: row.used("pulled_bytes"), _mebibytes),
    _Column("reused MiB", lambda row: row.used("kv_reused_bytes"), _mebibytes),
    _Column("tokens", lambda row: row.tokens, _count),
    _Column("tokens/s", lambda row: row.tokens_per_s, _tenths),
    _Column("first text s", lambda row: row.first_text, _seconds),
    _Column("first step s", lambda row: row.first_step, _seconds),
    _Column("steps", lambda row: row.steps, _count),
    _Column("ms/step", lambda row: row.ms_per_step, _tenths),
    _Column("VAE s", lambda row: row.stage("decode"), _seconds),
    _Column("total s", lambda row: row.total, _seconds),
)
_SUMMARIES = {"mean": fmean, "p50": _percentile(50), "p99": _percentile(99)}
