"""vLLM's schedulers, changed so that they never split an image block over two steps."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from bagel_thinker.vllm.spans import whole_images


class _WholeImages:
    """Ends every step outside image blocks, since each token of an image attends to all of it."""

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        # disable_chunked_mm_input does not ensure that: vLLM ignores it for an image whose embeddings are cached, and
        # for one in whose middle a prefix-cache hit ends.
        spans = [(f.mm_position.offset, f.mm_position.length) for f in request.mm_features]
        num_new_tokens = whole_images(spans, num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )


class WholeImageScheduler(_WholeImages, Scheduler):
    """Schedules a step after the previous one has ended."""


class WholeImageAsyncScheduler(_WholeImages, AsyncScheduler):
    """Schedules a step while the previous one runs, as vLLM does on GPUs."""
