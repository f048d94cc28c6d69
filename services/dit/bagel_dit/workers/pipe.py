"""A rank's end of the pipe to its server. No torch here."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

from bagel_dit.workers.messages import Order, Report


class Pipe:
    """Orders for the main thread, reports from any."""

    def __init__(self, connection: Connection) -> None:
        # A lock, as two threads that write to a connection at once would mix their reports.
        self._connection, self._sending = connection, threading.Lock()

    def next(self, timeout_s: float | None) -> Order | None:
        """The next order; None if none came for so long. EOFError or OSError once the server is gone."""
        if not self._connection.poll(timeout_s):
            return None
        order: Order = self._connection.recv()
        return order

    def send(self, report: Report) -> None:
        """Send the server a report."""
        with self._sending:
            self._connection.send(report)
