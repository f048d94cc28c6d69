"""Answers that clients have not read yet: how many bytes wait, since when, and which are dropped. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bagel.errors import ConfigError
from bagel.rpc.limits import MAX_UNREAD_BYTES, MAX_UNREAD_CALL_BYTES, READER_TIMEOUT_S
from bagel.telemetry.logs import Log

SLOWEST_BYTES_PER_S = 64 * 1024
"""The rate at which a reader must take one large message, beyond its timeout: a picture over a bad mobile network."""

log = Log("bagel.unread")


class Unread:
    """The unread answers of one process. limit_bytes: the limit for all; call_bytes: the limit for one call.

    reader_timeout_s: the longest time in which a reader may take nothing. When all answers together exceed the limit,
    the one that has waited longest is dropped, so that a client that does not read cannot lock out others.
    """

    def __init__(
        self,
        reader_timeout_s: float = READER_TIMEOUT_S,
        limit_bytes: int = MAX_UNREAD_BYTES,
        call_bytes: int = MAX_UNREAD_CALL_BYTES,
    ) -> None:
        if not 0 < reader_timeout_s < float("inf"):
            message = f"reader_timeout is {reader_timeout_s}; it must be seconds above 0, like 60"
            raise ConfigError(message, "reader_timeout")
        for field, value in {"max_unread_bytes": limit_bytes, "max_unread_bytes_per_call": call_bytes}.items():
            if value < 1:
                raise ConfigError(f"{field} is {value}; it must be at least 1", field)
        self.reader_timeout_s, self.limit_bytes, self.call_bytes = reader_timeout_s, limit_bytes, call_bytes
        self.slowest_bytes_per_s = SLOWEST_BYTES_PER_S
        self.nbytes = 0
        self._waiting: dict[Waiting, None] = {}

    def time_for(self, nbytes: int) -> float:
        """Seconds that a reader has for one message."""
        return self.reader_timeout_s + nbytes / self.slowest_bytes_per_s

    @contextmanager
    def waiting(self, give_up: Callable[[str], None]) -> Iterator[Waiting]:
        """Count what waits for one reader during the block. give_up: called once, with the reason, if it is dropped."""
        one = Waiting(self, give_up)
        try:
            yield one
        finally:
            one.close()

    def _change(self, one: Waiting, nbytes: int) -> None:
        self.nbytes += nbytes - one.nbytes
        one.nbytes = nbytes
        if nbytes:
            self._waiting.setdefault(one)
        else:
            self._waiting.pop(one, None)
        while self.nbytes > self.limit_bytes and self._waiting:
            longest = min(self._waiting, key=lambda each: each.since)
            seconds = time.monotonic() - longest.since
            why = f"{self.nbytes} bytes wait for readers, more than max_unread_bytes, {self.limit_bytes}"
            log.warning("an unread answer is given up", bytes=longest.nbytes, waited_seconds=round(seconds, 1), why=why)
            # Cleared first, so that nothing this reader is sent from now on is counted again.
            give_up, longest.give_up = longest.give_up, None
            longest.close()
            if give_up is not None:
                give_up(why)


class Waiting:
    """Bytes that wait for one reader. since: the time.monotonic at which it last took some, or the wait began."""

    def __init__(self, unread: Unread, give_up: Callable[[str], None]) -> None:
        self._unread = unread
        self.give_up: Callable[[str], None] | None = give_up
        self.nbytes, self.since = 0, time.monotonic()

    def add(self, nbytes: int) -> None:
        """So many more wait."""
        # The wait begins with the first byte, not with the call.
        if not self.nbytes:
            self.since = time.monotonic()
        # A reader that was dropped is not counted any more.
        if self.give_up is not None:
            self._unread._change(self, self.nbytes + nbytes)

    def take(self, nbytes: int) -> None:
        """The reader has taken so many."""
        self.since = time.monotonic()
        if self.give_up is not None:
            self._unread._change(self, self.nbytes - nbytes)

    def close(self) -> None:
        """Nothing waits any more."""
        self._unread._change(self, 0)
