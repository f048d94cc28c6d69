"""From the engine's thread to the event loop: many events, one wake-up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Post:
    """Delivers on an event loop what another thread hands in, in order.

    Waking the loop is a system call. A step of the engine has an event for every text it writes; the loop is woken
    once for all that come before it looks.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock = loop, threading.Lock()
        self._waiting: list[Callable[[], None]] = []

    def send(self, put: Callable[[T], None], event: T) -> None:
        """Have put(event) called on the loop; nothing once the loop is closed."""
        with self._lock:
            self._waiting.append(lambda: put(event))
            # The loop is already awake for the others.
            first = len(self._waiting) == 1
        if first:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        # Without the lock, so that the engine's thread need not wait for these calls.
        for call in waiting:
            call()
