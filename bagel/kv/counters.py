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

    def count(self, **amounts: int) -> None:
        """Add to counters, by their names."""
        with self._lock:
            # Under the lock: an engine's thread counts beside the event loop.
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

    @contextmanager
    def pulling(self) -> Iterator[None]:
        """Counts a pull while it runs."""
        self.count(pulls=1)
        try:
            yield
        finally:
            self.count(pulls=-1)
