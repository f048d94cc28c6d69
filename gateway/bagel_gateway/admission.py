"""How many requests are under way at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bagel.errors import Busy, Draining

RETRY_AFTER_S = 1.0


class Admission:
    """At most `limit` requests under way; as many more may wait up to wait_s for their turn, first come first served.

    draining: once set, nothing new is admitted. waiting: all that wait, the results of calls that have begun included.
    """

    def __init__(self, limit: int, wait_s: float, draining: asyncio.Event) -> None:
        self.under_way = self.waiting = self._new = 0
        self._limit, self._wait_s, self._draining = limit, wait_s, draining
        self._places = asyncio.Semaphore(limit)

    @asynccontextmanager
    async def admit(self, *, begun: bool = False) -> AsyncIterator[float]:
        """A place for the block, and the seconds that it was waited for: 0 for one that was free.

        begun: for one more result of a call that was accepted; it waits for as long as the call lasts, also while the
        gateway drains. Raises Busy if there is none in time, Draining if the gateway shuts down.
        """
        waited_s = await self._take(begun)
        self.under_way += 1
        try:
            yield waited_s
        finally:
            self.under_way -= 1
            self._places.release()

    async def _take(self, begun: bool) -> float:
        if not begun:
            self._check_draining()
        if not self._places.locked():
            await self._places.acquire()
            return 0.0
        began = time.perf_counter()
        await (self._wait() if begun else self._wait_in_time())
        if self._draining.is_set() and not begun:
            self._places.release()
            self._check_draining()
        return time.perf_counter() - began

    async def _wait_in_time(self) -> None:
        if self._new >= self._limit or self._wait_s <= 0:
            raise self._busy()
        self._new += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await self._wait()
        except TimeoutError:
            raise self._busy() from None
        finally:
            self._new -= 1

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1

    def _busy(self) -> Busy:
        return Busy(
            f"the gateway serves {self.under_way} requests, its limit; try again later, or raise --max-requests",
            RETRY_AFTER_S,
        )

    def _check_draining(self) -> None:
        if self._draining.is_set():
            raise Draining("the gateway is shutting down and takes no new requests; send it to another one")
