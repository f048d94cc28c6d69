"""How long a caller waits, as gRPC takes it. No torch here."""

from __future__ import annotations

from bagel.errors import InvalidRequest

LONGEST_S = 10 * 365 * 86_400.0
"""Ten years: nothing waits longer, and gRPC's clocks cannot count for ever."""


def deadline_of(timeout: object) -> float | None:
    """Seconds until a call is given up; None for no deadline, which infinity and more than ten years mean too.

    Raises InvalidRequest for what is no number of seconds.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise InvalidRequest("timeout", f"timeout is {timeout!r:.80}; it must be 0 or more seconds, or None for none")
    return None if timeout > LONGEST_S else float(timeout)
