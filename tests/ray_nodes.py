"""Nodes of a Ray cluster on this machine. Ray itself is not imported here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 78 * 2**20, "include_dashboard": False}
"""With one CPU each, so that each rank has a node of its own."""


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node. Ray gives its processes 30 s for it, which may be too little on a machine that runs much else."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()
