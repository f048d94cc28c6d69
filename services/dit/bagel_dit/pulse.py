"""Whether a runner's threads get on: one that hangs raises nothing, and nobody would hear of it. No torch here."""

from __future__ import annotations

import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from bagel_dit.messages import Alive, Hung, Reply

LOOK_S = 1.0
IO = Path("/proc/self/io")


class Pulses:
    """What each thread is at: the number of its latest beat, none while it waits for work.

    A beat is a piece of work that begins, or a layer of the model that is done: a step of a large model on a CPU may
    take many minutes, a layer does not. Written by each thread, read by the watch.
    """

    def __init__(self) -> None:
        self._beats = count()
        self._latest: dict[int, int] = {}
        self.loading = True
        """Whether the main thread loads the model; it beats as long as the process computes or reads."""

    def beat(self) -> None:
        """The calling thread gets on with its work."""
        self._latest[threading.get_ident()] = next(self._beats)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around a piece of work of the calling thread."""
        self.beat()
        try:
            yield
        finally:
            self._latest.pop(threading.get_ident(), None)

    def latest(self) -> dict[int, object]:
        """The latest beat of each thread that works."""
        main = threading.main_thread().ident
        return {main: _used()} if self.loading and main is not None else dict(self._latest)


class Watch(threading.Thread):
    """Tells that the process runs, and if one of its threads has hung: made no beat for `limit_s`.

    Only time in which this runs counts: a process that was stopped for a while has not hung.
    """

    def __init__(self, pulses: Pulses, limit_s: float, send: Callable[[Reply], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self._pulses, self._limit_s, self._send = pulses, limit_s, send

    def run(self) -> None:
        """Watch until the server is gone, or something hangs."""
        look_s = min(LOOK_S, self._limit_s / 4)
        seen: dict[int, object] = {}
        waited: dict[int, float] = {}
        with suppress(OSError):
            while True:
                time.sleep(look_s)
                now = self._pulses.latest()
                waited = {at: waited.get(at, 0) + look_s if seen.get(at) == beat else 0.0 for at, beat in now.items()}
                seen = now
                self._send(Alive())
                for thread, seconds in waited.items():
                    if seconds >= self._limit_s:
                        self._send(Hung(self._pulses.loading, _stack(thread)))
                        return


def _used() -> object:
    """What the process has computed and read so far, coarsely, but for the calling thread."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    read = 0
    with suppress(OSError):  # no /proc
        read = int(IO.read_text().split()[1])
    return int((time.process_time() - time.thread_time()) * 20), read >> 20, usage.ru_majflt, usage.ru_inblock


def _stack(thread: int) -> str:
    """Where that thread is."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
