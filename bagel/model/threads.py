"""How many threads a model computes with on a CPU."""

from __future__ import annotations

import os

import torch

from bagel.checkpoint.config import ModelConfig

SMALL = 256
"""Hidden size up to which a second thread costs more than it computes (bench/README.md, "Why one thread")."""


def share_threads(ranks: int) -> None:
    """Let this process compute with its part of the CPU threads, one of so many ranks of this host."""
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


def settle_threads(config: ModelConfig, device: torch.device | str) -> None:
    """Let this process compute a small model with one CPU thread, unless OMP_NUM_THREADS says how many.

    A layer of such a model ends before a sleeping thread wakes up. A thread that spins instead of sleeping takes the
    processor from the services beside it.
    """
    if torch.device(device).type == "cpu" and config.llm.hidden_size <= SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
