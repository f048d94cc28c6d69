"""Garbage collection in a process that has begun to serve. No torch here."""

from __future__ import annotations

import gc


def keep_loaded() -> None:
    """Have the collector leave alone all that is there now: it stays for as long as the process does.

    A full collection walks every object, and nothing is served meanwhile: a quarter of a second with nano loaded.
    """
    # Collected first, so that garbage is not kept with the rest.
    gc.collect()
    gc.freeze()
