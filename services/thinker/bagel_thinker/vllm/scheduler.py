"""vLLM's scheduler, which never splits an image block over two steps."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from bagel_thinker.vllm.spans import whole_images


class _WholeImages:
    """Tokens of an image attend to all of it, so all of it must be computed, or cached, by the end of a step.

    disable_chunked_mm_input alone does not hold that: it is passed over for an image whose embeddings are cached and
    for one that a prefix-cache hit ends in.
    """

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        spans = [(f.mm_position.offset, f.mm_position.length) for f in request.mm_features]
        num_new_tokens = whole_images(spans, num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )


class WholeImageScheduler(_WholeImages, Scheduler):
    """Schedules a step after the one before it has ended."""


class WholeImageAsyncScheduler(_WholeImages, AsyncScheduler):
    """Schedules a step while the one before it runs, as vLLM does on GPUs."""
