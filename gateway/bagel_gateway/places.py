"""How many requests the gateway lets under way: as many as --max-requests says, or as its stages have places for.

A longer queue would serve no more, only later. Texts and pictures have a queue each where they go through different
stages: pictures that wait for a DiT must not keep texts from a Thinker that is idle. And images, which take seconds to
decode, must not keep out requests that have none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.shared_settings import BATCH_TIMEOUT_S
from bagel.pipelines import PipelineConfig
from bagel.request import Modality
from bagel.rpc.admission import Admission, Count
from bagel_gateway.backends import Backends

LEAST = 4
"""Requests under way, and as many that wait, however few places the stages have: together the eight that one of our
clients begins with at once."""
PATIENCE = 0.25
"""Of what a request takes: so long there may be a queue. Measured with `python -m bench load`."""
WITHOUT_IMAGES = 2
"""Places of a queue that requests with images leave to those without."""
RETRY_AFTER_S = 1.0


class Places:
    """The places of a gateway's requests, by what they make. under_way, waiting: as of `Admission`, of all requests."""

    def __init__(
        self, config: GatewayConfig, deployed: PipelineConfig, backends: Backends, draining: asyncio.Event
    ) -> None:
        """draining: once set, nothing new is admitted."""
        self._backends, self._wait_s, self._draining = backends, config.batch_timeout_s, draining
        paths = {output: tuple(stage.model_stage for stage in deployed.path(output)) for output in ("text", "image")}
        queues: dict[tuple[str, ...], tuple[Admission, ...]] = {}
        if config.max_requests is not None:
            most, settings = config.max_requests, "--max-requests or --batch-timeout"
            queues = dict.fromkeys(paths.values(), (self._queue(most, most, settings),))
        else:
            for path in paths.values():
                queues[path] = (self._queue_of(path, 0), self._queue_of(path, WITHOUT_IMAGES))
        self._of = {output: queues[path] for output, path in paths.items()}

    @asynccontextmanager
    async def admit(self, modality: Modality | None, *, begun: bool = False) -> AsyncIterator[float]:
        """A place, and the seconds that it was waited for; as `Admission.admit`.

        modality None: it cannot be read, and the request is refused once it is.
        """
        queue, *with_images = self._of["image" if modality is not None and modality.makes_image else "text"]
        async with AsyncExitStack() as stack:
            waited_s = 0.0
            for each in (*(with_images if modality is not None and modality.reads_image else ()), queue):
                waited_s += await stack.enter_async_context(each.admit(begun=begun))
            yield waited_s

    @property
    def under_way(self) -> int:
        return sum(queue.under_way for queue in {queues[0] for queues in self._of.values()})

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self._all)

    def refill(self) -> None:
        """Give places that the stages have got to requests that wait."""
        for queue in self._all:
            queue.refill()

    @property
    def _all(self) -> set[Admission]:
        return {queue for queues in self._of.values() for queue in queues}

    def _queue(self, limit: Count, max_waiting: Count, settings: str, patience: float | None = None) -> Admission:
        return Admission(
            "the gateway",
            limit,
            self._wait_s,
            settings=settings,
            max_waiting=max_waiting,
            patience=patience,
            retry_after_s=RETRY_AFTER_S,
            draining=self._draining,
        )

    def _queue_of(self, stages: Sequence[str], left: int) -> Admission:
        settings = "--max-num-seqs of the stages, --max-requests or --batch-timeout"
        limit, waiting = partial(self._limit, stages, left), partial(self._most_waiting, stages, left)
        return self._queue(limit, waiting, settings, PATIENCE * self._longer)

    def _limit(self, stages: Sequence[str], left: int) -> int:
        # The sum: while some are drawn the next ones are read, so that no stage waits for another.
        return max(LEAST, self._backends.places(stages)) - left

    def _most_waiting(self, stages: Sequence[str], left: int) -> int:
        return int(self._limit(stages, left) * self._longer)

    @property
    def _longer(self) -> float:
        """How much longer than by default requests may wait: who sets that wants more of them to wait."""
        return max(1.0, self._wait_s / BATCH_TIMEOUT_S)
