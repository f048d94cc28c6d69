"""The pages of some segments that one pull still waits for, and those of them that may be sent next."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count

from bagel.kv.segment import Segment


class OpenPages:
    """Pages that somebody wants, each given out once.

    Of those that are ready the first layers come first, whichever segment they are of: a picture's first step can
    compute with a layer once it has it whole (bagel.engine.early_step).
    """

    def __init__(self) -> None:
        self._waiting: dict[Segment, set[tuple[int, int]]] = {}
        self._seen: dict[Segment, int] = {}
        self._ready: list[tuple[int, int, Segment, int]] = []
        self._order = count()

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(self._waiting)

    @property
    def left(self) -> int:
        """Pages that are still to be given out."""
        return len(self._ready) + sum(map(len, self._waiting.values()))

    def want(self, segment: Segment, layer: int, token_begin: int) -> None:
        """Wait for a page of a segment."""
        self._waiting.setdefault(segment, set()).add((layer, token_begin))
        self._seen.setdefault(segment, 0)

    def look(self) -> None:
        """Find the pages that have become ready. Raises the error of a segment that is gone."""
        for segment, waiting in self._waiting.items():
            log = segment.alive().log
            new = [page for page in log[self._seen[segment] :] if page in waiting]
            self._seen[segment] = len(log)
            waiting.difference_update(new)
            for layer, begin in new:
                # Numbered, so that pages of a layer keep their order and segments are never compared.
                heappush(self._ready, (layer, next(self._order), segment, begin))

    def take(self, most: int) -> Iterator[tuple[Segment, int, int]]:
        """Give out ready pages: segment, layer and token begin."""
        for _ in range(min(most, len(self._ready))):
            layer, _, segment, begin = heappop(self._ready)
            yield segment, layer, begin
