"""Which rank is to blame when a group ends: one rank's end is soon told by all others, which wait for it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

GRACE_S = 0.5
"""Seconds in which further ranks may tell why they end, before the group is killed."""


class Weight(IntEnum):
    """How much a rank's own word on its end explains; the least first."""

    TOLD = 1
    """It said so itself: perhaps only that it lost another rank."""
    KILLED_HERE = 2
    """It was silent, stopped or hung."""
    ENDED = 3
    """Its process ended by itself."""


@dataclass(frozen=True)
class End:
    """The end of one rank."""

    rank: int
    cause: str
    weight: Weight


def verdict(ends: list[End]) -> End:
    """The end that explains the others: of those that weigh most, the first."""
    return max(ends, key=lambda end: end.weight)
