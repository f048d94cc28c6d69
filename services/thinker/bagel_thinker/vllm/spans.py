"""Where images lie in a prompt, and what that means for positions, attention and steps. Plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Span = tuple[int, int]
"""(first token, tokens) of an image block."""


def placed_positions(tokens: int, spans: Sequence[Span]) -> list[int]:
    """Rope positions of a prompt: text counts on, all of a span shares one, the next token is one after it."""
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
    """How many of `new` tokens after `computed` may be scheduled so that no span is left in its middle."""
    end = computed + new
    for start, length in spans:
        if start < end < start + length:
            return max(0, start - computed)
    return new


class Piece(NamedTuple):
    """Queries [begin, end) of a request that see its first `visible` rows, the last of them causally or all."""

    begin: int
    end: int
    visible: int
    causal: bool


def pieces(begin: int, end: int, spans: Sequence[Span]) -> Iterator[Piece]:
    """Split queries [begin, end) of a request where its bidirectional spans begin and end.

    Raises RuntimeError for a span that reaches past the end: its last rows are not there yet.
    """
    at = begin
    for start, length in sorted(spans):
        stop = start + length
        if stop <= at or start >= end:
            continue
        if stop > end:
            raise RuntimeError(f"an image at rows {start} to {stop} was scheduled only up to row {end}")
        if start > at:
            yield Piece(at, start, start, causal=True)
        yield Piece(max(at, start), stop, stop, causal=False)
        at = stop
    if at < end:
        yield Piece(at, end, end, causal=True)
