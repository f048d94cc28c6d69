"""Events between a request's work and its reader. The work does not wait; its events do, up to a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

from bagel.errors import NotRead
from bagel.rpc.coalescing_queue import CoalescingQueue
from bagel.rpc.unread import Unread, Waiting
from bagel.telemetry.logs import Log

T = TypeVar("T")
Sized = tuple[T, int]
Join = Callable[[T, T], T | None]

log = Log("bagel_gateway.outbox")


async def delivered(
    work: Callable[[Callable[[T], None]], Awaitable[None]], join: Join[T], size: Callable[[T], int], unread: Unread
) -> AsyncGenerator[T, None]:
    """What `work` puts, at the reader's pace; then raises what the work failed with. Closed early it cancels the work.

    join makes one of two items that wait, or gives None if they stay apart. Raises NotRead, and cancels the work, once
    more bytes wait than `unread` allows.
    """
    box = _Outbox(join, size, unread.call_bytes)
    with unread.waiting(box.give_up) as waiting:
        box.begin(work, waiting)
        try:
            while (item := await box.take()) is not None:
                yield item[0]
            await box.ended()
        finally:
            await box.stop()


class _Outbox(Generic[T]):
    def __init__(self, join: Join[T], size: Callable[[T], int], limit_bytes: int) -> None:
        self._join, self._size, self._limit_bytes = join, size, limit_bytes
        self._items: CoalescingQueue[Sized[T] | None] = CoalescingQueue(self._join_sized)
        self._error: NotRead | None = None
        self._in_hand = 0

    def begin(self, work: Callable[[Callable[[T], None]], Awaitable[None]], waiting: Waiting) -> None:
        self._waiting = waiting
        self._work = asyncio.create_task(self._run(work))

    async def _run(self, work: Callable[[Callable[[T], None]], Awaitable[None]]) -> None:
        try:
            await work(self._put)
        finally:
            # Also after a failure: the reader then asks how the work ended.
            self._items.put(None)

    def _put(self, item: T) -> None:
        # Work that is being cancelled may still put something.
        if self._error is not None:
            return
        nbytes = self._size(item)
        self._items.put((item, nbytes))
        self._waiting.add(nbytes)
        if self._waiting.nbytes > self._limit_bytes:
            self.give_up(
                f"its client has left {self._waiting.nbytes} bytes of it, more than --max-unread-bytes-per-call"
            )

    async def take(self) -> Sized[T] | None:
        """The next item; None at the end. The one before has been read."""
        self._waiting.take(self._in_hand)
        self._in_hand = 0
        item = await self._items.get()
        if self._error is not None:
            raise self._error
        if item is not None:
            self._in_hand = item[1]
        return item

    def give_up(self, why: str) -> None:
        """Cancel the work, and drop what it has made."""
        if self._error is None:
            self._error = NotRead(f"the answer was not read in time, and is given up: {why}; read on while it comes")
            log.warning("a request ends whose answer is not read", why=why)
            self._items.clear()
            self._items.put(None)
            self._waiting.close()
            self._work.cancel()

    async def ended(self) -> None:
        """Raise what the work failed with."""
        await self._work

    async def stop(self) -> None:
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)

    def _join_sized(self, one: Sized[T] | None, other: Sized[T] | None) -> Sized[T] | None:
        if one is None or other is None or (both := self._join(one[0], other[0])) is None:
            return None
        return both, one[1] + other[1]
