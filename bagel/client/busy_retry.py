"""Requests of one caller at once: one that is refused as busy while others run is tried again. No torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from bagel.errors import Busy


@dataclass
class Attempt:
    """One call. begun: set by the caller once the call is accepted; refused: why to try again, if so."""

    begun: bool = False
    refused: Busy | None = None


@dataclass(frozen=True)
class Turn:
    """When to try a refused call again: once `free` is done, or after `seconds`."""

    free: Future[None]
    seconds: float


class BusyRetry:
    """Decides whether and when a request that is refused as busy is tried again. Thread-safe.

    While other requests of the same caller run, the gateway is busy with those: the refused one is tried again as soon
    as one of them ends. Where none of them ran, other callers keep the gateway busy: Busy is raised, and the caller
    decides.
    """

    def __init__(self) -> None:
        self._lock, self._running, self._served = Lock(), 0, 0
        self._refused: deque[Future[None]] = deque()

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The block makes one call."""
        attempt = Attempt()
        with self._lock:
            self._running += 1
            served = self._served
        try:
            yield attempt
        except Busy as busy:
            with self._lock:  # where one has just ended, other callers took its place
                alone = self._running == 1 and self._served == served
            if attempt.begun or alone:
                raise
            attempt.refused = busy
        finally:
            self._end(attempt)

    def turn(self, refused: Busy) -> Turn:
        """When a refused call is tried again: refused calls come one after the other, not all at once."""
        with self._lock:
            free: Future[None] = Future()
            self._refused = deque(each for each in self._refused if not each.done())
            self._refused.append(free)
            return Turn(free, refused.retry_after_s * len(self._refused))

    def _end(self, attempt: Attempt) -> None:
        with self._lock:
            self._running -= 1
            self._served += attempt.begun
            while attempt.begun and self._refused:
                free = self._refused.popleft()
                if free.set_running_or_notify_cancel():
                    free.set_result(None)
                    return
