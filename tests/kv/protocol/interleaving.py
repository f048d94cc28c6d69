"""An event loop that a test drives one callback at a time, in an order that the test chooses, in virtual time."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
MOST_STEPS = 100_000
"""More callbacks than any example needs: a loop that goes on beyond them never comes to rest."""


class InterleavingLoop(asyncio.BaseEventLoop):
    """Runs one ready callback a step, which one is the caller's choice; time passes only by `pass_time`.

    Whatever real threads, sockets and schedulers could reorder, a choice reorders here, and the same choices give the
    same run. failures: what callbacks and forgotten tasks have raised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.failures: list[str] = []
        self.set_exception_handler(lambda _, context: self.failures.append(str(context)))

    def time(self) -> float:
        return self.now

    def step(self, pick: int = 0) -> bool:
        """Run the ready callback number `pick`, counted round and round; False if none is ready."""
        ready = self._ready  # type: ignore[attr-defined]
        if not ready:
            return False
        place = pick % len(ready)
        handle = ready[place]
        del ready[place]
        self._inside(lambda: None if handle.cancelled() else handle._run())
        return True

    def is_busy(self) -> bool:
        """Whether a callback is ready."""
        return bool(self._ready)  # type: ignore[attr-defined]

    def settle(self, picks: Iterable[int] = ()) -> None:
        """Run callbacks until none is ready, without time; the first ones as picked, then in their order."""
        choices = iter(picks)
        for _ in range(MOST_STEPS):
            if not self.step(next(choices, 0)):
                return
        raise AssertionError("callbacks follow each other without end while no time passes")

    def pass_time(self, seconds: float, picks: Iterable[int] = ()) -> None:
        """Let timers fire one after another, and everything that follows from each, until so much time has passed."""
        choices, end = iter(picks), self.now + seconds
        self.settle(choices)
        timers = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._when <= end:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer.cancelled():
                self.now = max(self.now, timer._when)
                self._ready.append(timer)  # type: ignore[attr-defined]
                self.settle(choices)
        self.now = end

    def call(self, function: Callable[[], T]) -> T:
        """The result of a function that wants a running loop, as from a callback."""
        return self._inside(function)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task, which has not begun."""
        return self.create_task(coroutine)

    def finish(self, coroutine: Coroutine[Any, Any, T], within_s: float = 0.0) -> T:
        """The result of a coroutine that is done within so much virtual time."""
        task = self.start(coroutine)
        self.pass_time(within_s)
        assert task.done(), f"not done within {within_s:g} s: {task}"
        return task.result()

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def _inside(self, function: Callable[[], T]) -> T:
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            return function()
        finally:
            asyncio._set_running_loop(before)
