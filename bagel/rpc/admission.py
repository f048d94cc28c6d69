"""How many requests a service works on at once, and how long further ones wait for a place. No torch here."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from bagel.errors import Busy, Draining

TAKES_WEIGHT = 0.05
"""That of the last request in the running mean of how long one has its place."""
Count = int | Callable[[], int]
"""A number, or what says it each time that it is asked for."""


class Admission:
    """At most `limit` requests under way; further ones wait for a place, first come first served.

    under_way, waiting: requests that have a place, and that wait for one.
    """

    def __init__(
        self,
        owner: str,
        limit: Count,
        wait_s: float,
        *,
        settings: str = "--max-num-seqs or --batch-timeout",
        max_waiting: Count | None = None,
        patience: float | None = None,
        retry_after_s: float | None = None,
        draining: asyncio.Event | None = None,
    ) -> None:
        """owner, settings: what messages call the service, and what to raise; max_waiting: new requests that may wait.

        wait_s: how long a new request waits; retry_after_s: when one that is refused may come again, after wait_s by
        default; draining: once set, nothing new is admitted. After a limit has risen `refill` must be called.

        patience: for how much of the time that a request has its place there may be a queue; then new requests are
        refused until it was empty. A queue that lasts makes every answer late and serves no more ("controlled delay":
        Maurer, Fail at Scale, ACM Queue 13(8), 2015). None: for ever.
        """
        self.under_way = self.waiting = self._new = 0
        self._owner, self._limit, self._wait_s, self._settings = owner, limit, wait_s, settings
        self._max_waiting, self._draining = max_waiting, draining
        self._retry_after_s = wait_s if retry_after_s is None else retry_after_s
        self._patience, self._queue_began = patience, 0.0
        self._takes_s: float | None = None  # a running mean
        self._taken = 0  # places, also those that were just given to one that has waited
        self._queue = deque[asyncio.Future[None]]()

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return _now(self._limit)

    @asynccontextmanager
    async def admit(self, *, begun: bool = False) -> AsyncIterator[float]:
        """A place for the block, and the seconds that it was waited for: 0 for one that was free.

        begun: the request was accepted before; it waits for as long as its call lasts, also while the service drains.
        Raises Busy if no place becomes free in time, Draining if the service shuts down.
        """
        waited_s = await self._take(begun)
        self.under_way += 1
        began = time.perf_counter()
        try:
            yield waited_s
        finally:
            self.under_way -= 1
            self._took(time.perf_counter() - began)
            self._give_back()

    def refill(self) -> None:
        """Give the places that are free to those that have waited longest."""
        while self._queue and self._taken < self.limit:
            turn = next((each for each in self._queue if not each.done()), None)
            if turn is None:  # all of them are just leaving
                return
            self._queue.remove(turn)
            self._taken += 1
            turn.set_result(None)

    async def _take(self, begun: bool) -> float:
        if not begun:
            self._check_draining()
        self.refill()
        if self._taken < self.limit:  # and so nobody waits
            self._taken += 1
            return 0.0
        began = time.perf_counter()
        await (self._wait() if begun else self._wait_in_time())
        # The service may have begun to drain during the wait.
        if not begun and self._draining is not None and self._draining.is_set():
            self._give_back()
            self._check_draining()
        return time.perf_counter() - began

    async def _wait_in_time(self) -> None:
        # Only new requests count: one that has begun was accepted, and is not refused any more.
        if self._max_waiting is not None and self._new >= _now(self._max_waiting):
            raise self._busy(f"{self._new} more wait already")
        now = time.perf_counter()
        if not self._new:
            self._queue_began = now
        elif self._lasts(lasted_s := now - self._queue_began):
            raise self._busy(f"others have waited without a pause for {lasted_s:.2g} s")
        self._new += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await self._wait()
        except TimeoutError:
            raise self._busy(f"no place became free within {self._wait_s:g} s") from None
        finally:
            self._new -= 1

    def _lasts(self, queue_s: float) -> bool:
        """Whether a queue of that age is more than a burst."""
        if self._patience is None or self._takes_s is None:
            return False
        return queue_s > self._patience * self._takes_s

    def _took(self, seconds: float) -> None:
        mean = seconds if self._takes_s is None else self._takes_s
        self._takes_s = mean + TAKES_WEIGHT * (seconds - mean)

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.remove(turn)
            else:  # it got its place in the same moment
                self._give_back()
            raise
        finally:
            self.waiting -= 1

    def _give_back(self) -> None:
        self._taken -= 1
        self.refill()

    def _busy(self, why: str) -> Busy:
        return Busy(
            f"{self._owner} is busy: it serves {self.under_way} requests, its limit, and {why}; try again later, or "
            f"raise {self._settings}",
            self._retry_after_s,
        )

    def _check_draining(self) -> None:
        if self._draining is not None and self._draining.is_set():
            raise Draining(f"{self._owner} is shutting down and takes no new requests; send it to another one")


def _now(count: Count) -> int:
    return count if isinstance(count, int) else count()
