"""Requests of one caller under way together: what is refused while others run is tried again. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from bagel.errors import Busy


@dataclass
class Attempt:
    """One call. begun: set by the caller once something came of it; refused: why it is to be tried again, if it is."""

    begun: bool = False
    refused: Busy | None = None


class Together:
    """Tells whether one of several requests that is refused as busy is to be tried again. Thread-safe.

    So it is while others of the same caller run, which are what the gateway is busy with: then its time will come.
    Busy is raised where none of them is left: others keep the gateway busy, and the caller decides.
    """

    def __init__(self) -> None:
        self._lock, self._running = Lock(), 0

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The block makes one call."""
        attempt = Attempt()
        with self._lock:
            self._running += 1
        try:
            yield attempt
        except Busy as busy:
            if attempt.begun or self._running == 1:
                raise
            attempt.refused = busy
        finally:
            with self._lock:
                self._running -= 1
