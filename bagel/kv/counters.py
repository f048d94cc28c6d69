"""What a store has computed, sent and received since it was made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace


@dataclass
class KvStats:
    """Counters of a store; the fields of `GetStatsResponse`."""

    computed_segments: int = 0
    computed_pages: int = 0
    computed_bytes: int = 0
    reused_segments: int = 0
    reused_bytes: int = 0
    sent_pages: int = 0
    sent_bytes: int = 0
    received_pages: int = 0
    received_bytes: int = 0
    retried_pages: int = 0
    held_bytes: int = 0
    stored_bytes: int = 0
    capacity_bytes: int = 0
    leases: int = 0
    pulls: int = 0

    def as_dict(self) -> dict[str, int]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


class Counters:
    """The counters that only go up, and the pulls under way. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._stats = threading.Lock(), KvStats()

    def stats(self, **held: int) -> KvStats:
        """The counters now, with what the store holds."""
        with self._lock:
            return replace(self._stats, **held)

    def computed(self, pages: int, nbytes: int, segments: int) -> None:
        """Pages were computed here, the last ones of so many segments."""
        with self._lock:
            self._stats.computed_pages += pages
            self._stats.computed_bytes += nbytes
            self._stats.computed_segments += segments

    def received(self, pages: int, nbytes: int) -> None:
        """Pages came from a peer."""
        with self._lock:
            self._stats.received_pages += pages
            self._stats.received_bytes += nbytes

    def sent(self, nbytes: int) -> None:
        """A page was sent."""
        with self._lock:
            self._stats.sent_pages += 1
            self._stats.sent_bytes += nbytes

    def retried(self, pages: int) -> None:
        """Pages were asked for once more."""
        with self._lock:
            self._stats.retried_pages += pages

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Counts a pull while it runs."""
        with self._lock:
            self._stats.pulls += 1
        try:
            yield
        finally:
            with self._lock:
                self._stats.pulls -= 1
