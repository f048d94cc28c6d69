"""Ranges of numbers in words, as errors and help texts say them. Standard library alone."""

from __future__ import annotations


def in_words(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> str:
    """A range: both ends where there are two, and whether each belongs to it. None: no such end."""
    if at_least is not None and at_most is not None:
        return f"from {_plain(at_least)} to {_plain(at_most)}"
    ends = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    return " and ".join(f"{word} {_plain(end)}" for word, end in ends.items() if end is not None) or "that is finite"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.15g}"
