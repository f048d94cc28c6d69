"""How many files and connections a process may have open. No torch here."""

from __future__ import annotations

import resource
from contextlib import suppress


def raise_limit() -> None:
    """Raise what this process may open to what it may raise it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # where "unlimited" is not given, as on macOS, it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """What this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**30 if soft == resource.RLIM_INFINITY else soft
