"""Whether a rank's threads make progress: one that hangs raises nothing, so it is watched. No torch here."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bagel.engine.progress import Heartbeat
from bagel.parallel.rendezvous import clear
from bagel_dit.workers.messages import Alive, Hung, Report

LOOK_S = 1.0
IO = Path("/proc/self/io")


class Watch(threading.Thread):
    """Reports that the process runs, and if one of its threads has hung: made no beat for `limit_s`.

    Only time in which this runs counts: a process that was stopped for a while has not hung. rendezvous: where the
    ranks of a group have met; such a rank ends with the server, as it may wait for another rank and not read its pipe.
    """

    def __init__(
        self, heartbeat: Heartbeat, limit_s: float, send: Callable[[Report], None], rendezvous: str = ""
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._heartbeat, self._limit_s, self._send, self._rendezvous = heartbeat, limit_s, send, rendezvous
        self.loading = True
        """Whether the main thread loads the model; it makes progress as long as the process computes or reads."""

    def run(self) -> None:
        """Watch until the server is gone, or something hangs."""
        try:
            self._look()
        except OSError:
            if self._rendezvous:
                clear(self._rendezvous)
                os._exit(1)

    def _look(self) -> None:
        # Several looks fit into a short limit too.
        look_s = min(LOOK_S, self._limit_s / 4)
        seen: dict[int, object] = {}
        waited: dict[int, float] = {}
        while True:
            time.sleep(look_s)
            now = self._latest()
            # Counted in looks, not by the clock, which goes on while a process is stopped.
            waited = {at: waited.get(at, 0) + look_s if seen.get(at) == beat else 0.0 for at, beat in now.items()}
            seen = now
            self._send(Alive())
            for thread, seconds in waited.items():
                if seconds >= self._limit_s:
                    self._send(Hung(self.loading, _stack(thread)))
                    return

    def _latest(self) -> dict[int, object]:
        main = threading.main_thread().ident
        return {main: _used()} if self.loading and main is not None else dict(self._heartbeat.latest())


def _used() -> object:
    """What the process has computed and read so far, coarsely, but for the calling thread."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    read = 0
    with suppress(OSError):  # no /proc
        read = int(IO.read_text().split()[1])
    # In twentieths of a second and MiB: a process that hangs still uses a little.
    return int((time.process_time() - time.thread_time()) * 20), read >> 20, usage.ru_majflt, usage.ru_inblock


def _stack(thread: int) -> str:
    """Where that thread is."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
