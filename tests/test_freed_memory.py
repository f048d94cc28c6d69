"""Memory that was freed is used again, and not asked of the kernel anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from bagel.freed_memory import reuse_freed_memory
kept = reuse_freed_memory()
def work():
    for _ in range(10):
        pieces = [b"x" * (3 << 20) for _ in range(8)]
        del pieces
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Of a process that takes 24 MiB ten times, and gives them back each time."""


def faults(setting: str) -> tuple[str, int]:
    """Whether freed memory is kept, and how often the kernel gave a page."""
    command, environment = [sys.executable, "-c", FAULTS], {**os.environ, "BAGEL_MALLOC": setting}
    kept, count = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_used_again_unless_that_is_switched_off() -> None:
    kept, many = faults("0")
    assert kept == "False"
    kept, few = faults("1")
    assert kept == "True" and few < many / 10
