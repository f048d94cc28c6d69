"""The places of images in a prompt, and their effect on positions, attention and steps. Plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Span = tuple[int, int]
"""(first token, tokens) of an image block."""


def placed_positions(tokens: int, spans: Sequence[Span]) -> list[int]:
    """Rope positions of a prompt: text counts up, and all tokens of a span share one position."""
    positions: list[int] = []
    following = 0
    for start, length in sorted(spans):
        text = start - len(positions)
        positions += range(following, following + text)
        positions += [following + text] * length
        following += text + 1
    positions += range(following, following + tokens - len(positions))
    return positions


def whole_images(spans: Sequence[Span], computed: int, new: int) -> int:
    """How many of `new` tokens after `computed` a step may take so that it does not end within a span."""
    end = computed + new
    for start, length in spans:
        if start < end < start + length:
            return max(0, start - computed)
    return new


class Piece(NamedTuple):
    """Queries [begin, end) of a request. They see its first `visible` rows, all of them or causally."""

    begin: int
    end: int
    visible: int
    causal: bool


def pieces(begin: int, end: int, spans: Sequence[Span]) -> Iterator[Piece]:
    """Split queries [begin, end) of a request where its bidirectional spans begin and end.

    Raises RuntimeError for a span that reaches past the end, since its last rows are not computed yet.
    """
    at = begin
    for start, length in sorted(spans):
        stop = start + length
        if stop <= at or start >= end:  # outside this step
            continue
        if stop > end:
            raise RuntimeError(f"an image at rows {start} to {stop} was scheduled only up to row {end}")
        if start > at:
            yield Piece(at, start, start, causal=True)
        yield Piece(max(at, start), stop, stop, causal=False)
        at = stop
    if at < end:
        yield Piece(at, end, end, causal=True)
