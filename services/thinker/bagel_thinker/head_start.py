"""The first image of a context for the VAE, computed while it is still resized for the ViT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import ContextEvent, ContextRequest
from bagel.errors import BagelError
from bagel.images import ResizedImage
from bagel.v1 import common_pb2
from bagel_thinker.engine import Engine

Plan = Callable[[Sequence[common_pb2.Part], Sequence[ResizedImage]], Chain]


class HeadStart:
    """Begins a context with its segments up to the first image's VAE block, before the whole of it is known.

    They have no lease. That of the whole reserves their room in the store soon: mostly while the VAE encodes, so that
    their layers go there as they are computed, else they wait in the engine's cache. Leaving the block drops what is
    not computed yet. Errors are not told here, as the whole context meets the same.
    """

    def __init__(self, engine: Engine, plan: Plan, seed: int) -> None:
        self._engine, self._plan, self._seed = engine, plan, seed
        self._planning: asyncio.Task[ContextRequest | None] | None = None
        self._reading: ContextRequest | None = None

    def begin(self, parts: Sequence[common_pb2.Part], image: ResizedImage) -> None:
        """Compute what these parts begin a context with. Only the first call does, as an image may be read twice."""
        if self._planning is None:
            self._planning = asyncio.create_task(self._begin(parts, image))

    async def share(self, whole: ContextRequest) -> None:
        """Let the whole context, before it is submitted, count what was computed for it here."""
        if self._planning is not None and (reading := await self._planning) is not None:
            whole.computed, whole.layer_times = reading.computed, reading.layer_times

    async def _begin(self, parts: Sequence[common_pb2.Part], image: ResizedImage) -> ContextRequest | None:
        try:
            chain = await asyncio.to_thread(self._plan, parts, (image,))
        except BagelError:
            return None
        self._reading = ContextRequest(chain, self._seed, _unheard)
        self._engine.submit(self._reading)
        return self._reading

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._planning is not None:
            self._planning.cancel()
        if self._reading is not None:
            self._engine.cancel(self._reading)


def _unheard(event: ContextEvent) -> None:
    """What becomes of the head start alone concerns nobody."""
