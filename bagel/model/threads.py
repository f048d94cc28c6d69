"""How many threads a model computes with on a CPU."""

from __future__ import annotations

import os

import torch

from bagel.checkpoint.config import ModelConfig

SMALL = 256
"""Hidden size up to which a second thread costs more than it computes (bench/README.md, "Why one thread")."""


def settle_threads(config: ModelConfig, device: torch.device | str) -> None:
    """Have this process compute a small model with one thread of its CPU, unless OMP_NUM_THREADS says how many.

    A layer of such a model is over before a sleeping thread is awake, and one that does not sleep keeps the processor
    from the services beside it.
    """
    if torch.device(device).type == "cpu" and config.llm.hidden_size <= SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
