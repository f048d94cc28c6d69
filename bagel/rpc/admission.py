"""How many requests a stage works on at once, and how long further ones wait. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bagel.errors import Busy


class Slots:
    """The places in a stage's batch. owner: what to call the stage in messages.

    taken, waiting: requests that have a place, and that wait for one.
    """

    def __init__(self, owner: str, count: int, wait_s: float) -> None:
        self._owner, self._wait_s = owner, wait_s
        self._places = asyncio.Semaphore(count)
        self.taken = self.waiting = 0

    @asynccontextmanager
    async def place(self, *, begun: bool = False) -> AsyncIterator[None]:
        """A place for the block, first come first served; Busy if none becomes free in time.

        begun: the request was accepted before; it waits for as long as its call lasts.
        """
        self.waiting += 1
        try:
            async with asyncio.timeout(None if begun else self._wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise Busy(
                f"{self._owner} is busy: no place became free within {self._wait_s:g} s; try again later, or give it a "
                "larger --max-num-seqs or --batch-timeout",
                retry_after_s=self._wait_s,
            ) from None
        finally:
            self.waiting -= 1
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._places.release()
