"""What a store knows about one segment and one lease."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from bagel.errors import BagelError
from bagel.kv.pages import PageKey

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class ReadyPage(NamedTuple):
    """A page that is there: k and v are views of the store's memory, valid while the segment is pinned or leased."""

    key: PageKey
    token_end: int
    k: memoryview
    v: memoryview


@dataclass(eq=False)
class Segment:
    """One segment: `nbytes` from `offset` of the arena.

    log: its ready pages as (layer, token begin), in the order they became ready; error: why it is gone.
    """

    digest: bytes
    length: int
    offset: int
    nbytes: int
    page_count: int
    leases: int = 0
    pins: int = 0
    claim: Claim | None = None
    stored: bool = True
    error: BagelError | None = None
    log: list[tuple[int, int]] = field(default_factory=list)
    ready: set[tuple[int, int]] = field(default_factory=set)
    waiters: dict[Waiter, None] = field(default_factory=dict)

    @property
    def claimed(self) -> bool:
        return self.claim is not None

    @property
    def complete(self) -> bool:
        return len(self.log) == self.page_count

    @property
    def idle(self) -> bool:
        """Whether it may be evicted. A writer keeps its segment to the end, even if all leases end meanwhile."""
        return not self.leases and not self.pins and not self.claimed

    def alive(self) -> Segment:
        """The segment; raises its error if it is gone."""
        if self.error is not None:
            raise self.error
        return self

    def wake(self) -> None:
        """Wake all callers that wait for a change."""
        wake(self.waiters)


def wake(waiters: dict[Waiter, None]) -> None:
    """Wake all waiters in their order; from any thread."""
    for loop, future in waiters:
        with suppress(RuntimeError):  # a loop that is closed waits for nothing
            # Writers are other threads, and asyncio's futures are not thread-safe.
            loop.call_soon_threadsafe(_resolve, future)
    waiters.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    # A waiter of several segments may be woken more than once.
    if not future.done():
        future.set_result(None)


def name(digest: bytes) -> str:
    """How messages name a segment."""
    return f"segment {digest.hex()}"


@dataclass(eq=False, frozen=True)
class Claim:
    """One writer's right to fill a segment: until it is given back, or the segment is complete or gone.

    An object of its own, since a writer may give it back late, when another one fills the same segment anew.
    """

    segment: Segment

    @property
    def digest(self) -> bytes:
        return self.segment.digest


@dataclass(eq=False)
class Lease:
    """Segments kept until `deadline` of the store's clock."""

    lease_id: str
    ttl_s: float
    deadline: float
    segments: dict[bytes, Segment] = field(default_factory=dict)
