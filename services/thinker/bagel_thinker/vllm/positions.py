"""The positions of texts that are written on, for all of them at once.

vLLM computes M-RoPE positions request by request in every step, which takes four times as long: 0.16 ms for 64 texts.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np


def write_positions_at_once(worker: Any) -> None:
    """Have a worker's runner compute the positions of a step in which every request writes one token in one go."""
    runner = worker.model_runner
    each = runner._calc_mrope_positions

    def calc_mrope_positions(self: Any, scheduler_output: Any) -> None:
        if not _write_positions(self, scheduler_output.num_scheduled_tokens):
            each(scheduler_output)

    runner._calc_mrope_positions = MethodType(calc_mrope_positions, runner)


def _write_positions(runner: Any, scheduled: dict[str, int]) -> bool:
    """Whether all requests of a step are texts that are written on, one token each; their positions are set then."""
    names = runner.input_batch.req_ids
    count = len(names)
    if sum(scheduled.values()) != count:
        return False
    requests = [runner.requests[name] for name in names]
    computed = runner.input_batch.num_computed_tokens_cpu[:count]
    if (computed < [request.num_prompt_tokens for request in requests]).any():
        return False
    np.add(computed, [request.mrope_position_delta for request in requests], out=runner.mrope_positions.np[:, :count])
    return True
