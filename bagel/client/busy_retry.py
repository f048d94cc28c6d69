"""Requests of one caller at once: one that is refused as busy while others run is tried again. No torch here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bagel.client.calls import OnServiceEvent
from bagel.errors import Busy
from bagel.events import ServiceEvent


@dataclass
class Attempt:
    """One call. begun: whether it was accepted; refused: why to try again, if so."""

    begun: bool = False
    refused: Busy | None = None

    def hearing(self, on_event: OnServiceEvent | None) -> OnServiceEvent:
        """Takes the call's events, of which the first shows that the call was accepted."""

        def heard(event: ServiceEvent) -> None:
            self.begun = True
            if on_event is not None:
                on_event(event)

        return heard


class BusyRetry:
    """Decides whether and when a request that is refused as busy is tried again. For one event loop.

    While other requests of the same caller run, the gateway is busy with those: the refused one is tried again as soon
    as one of them ends. Where none of them ran, other callers keep the gateway busy: Busy is raised, and the caller
    decides.
    """

    def __init__(self) -> None:
        self._running = self._served = 0
        self._refused: deque[asyncio.Future[None]] = deque()

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The block makes one call."""
        attempt, served = Attempt(), self._served
        self._running += 1
        try:
            yield attempt
        except Busy as busy:
            # Where one has just ended, other callers took its place.
            if attempt.begun or (self._running == 1 and self._served == served):
                raise
            # Without the frames that it came through: they hold this attempt, and the call with its open connection.
            attempt.refused, busy.__context__ = busy.with_traceback(None), None
        finally:
            self._running -= 1
            # Only a call that was accepted frees a place when it ends.
            self._served += attempt.begun
            if attempt.begun and self._refused:
                self._refused.popleft().set_result(None)

    async def turn(self, refused: Busy, left_s: float | None) -> None:
        """Wait until a refused call may be tried again, at most so long.

        Refused calls come one after the other, not all at once.
        """
        free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refused.append(free)
        # Each waits behind those that were refused before it.
        seconds = refused.retry_after_s * len(self._refused)
        try:
            await asyncio.wait([free], timeout=seconds if left_s is None else min(seconds, left_s))
        finally:
            # A future that is done was taken out by the call that made room for it.
            if not free.done():
                self._refused.remove(free)
