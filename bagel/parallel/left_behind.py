"""What ranks that were killed leave on their host. No torch here."""

from __future__ import annotations

from pathlib import Path

_MEMORY = Path("/dev/shm")


def remove_left_behind(pid: int) -> None:
    """Remove a process's files in shared memory, once it has ended.

    PyTorch counts there who reads memory of a GPU that a process shares (bagel.parallel.peer_memory), and removes the
    files only if it ends by itself.
    """
    for each in _MEMORY.glob(f"torch_{pid}_*"):
        each.unlink(missing_ok=True)
