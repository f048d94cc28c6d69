"""A queue that merges the items that wait in it. No torch here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class CoalescingQueue(Generic[T]):
    """Items for one reader, in order; join(a, b) is both in one, or None if they stay apart.

    A fast reader gets every item by itself. A slow one gets fewer and longer items, as when many texts are streamed at
    once: the queue does not grow by messages that each cost more than their content.
    """

    def __init__(self, join: Callable[[T, T], T | None]) -> None:
        self._join = join
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Add an item; on the reader's event loop."""
        # With the last item only, so that the order stays.
        both = self._join(self._items[-1], item) if self._items else None
        if both is not None:
            self._items[-1] = both
        else:
            self._items.append(item)
        # Several items may be put before the reader runs.
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def clear(self) -> None:
        """Drop what waits."""
        self._items.clear()

    async def get(self) -> T:
        """The next item, as soon as there is one."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._items.popleft()
