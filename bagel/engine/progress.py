"""Signs of life of an engine's threads: a watch sees from them when one hangs. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Heartbeat:
    """What each thread is at: the number of its latest beat, none while it waits for work.

    A beat is a piece of work that begins, or a layer of the model that is done: a step of a large model on a CPU may
    take many minutes, a layer does not. Each thread writes its own, a watch reads all.
    """

    def __init__(self) -> None:
        # All threads share it without a lock: in CPython one call of next is atomic.
        self._beats = count()
        self._latest: dict[int, int] = {}

    def beat(self) -> None:
        """The calling thread makes progress."""
        self._latest[threading.get_ident()] = next(self._beats)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around a piece of work of the calling thread."""
        self.beat()
        try:
            yield
        finally:
            # A thread that waits for work does not beat and must not seem to hang.
            self._latest.pop(threading.get_ident(), None)

    def latest(self) -> dict[int, int]:
        """The latest beat of each thread that works."""
        # A copy, as the threads go on writing while the watch reads.
        return dict(self._latest)
