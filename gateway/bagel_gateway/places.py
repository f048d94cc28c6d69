"""How many requests the gateway lets under way: as many as --max-requests says, or as its stages have places for.

A longer queue would serve no more, only later. Texts and pictures have a queue each where they go through different
stages: pictures that wait for a DiT must not keep texts from a Thinker that is idle.
"""

from __future__ import annotations

import asyncio
from functools import partial

from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.shared_settings import BATCH_TIMEOUT_S
from bagel.pipelines import PipelineConfig
from bagel.request import Modality
from bagel.rpc.admission import Admission
from bagel_gateway.backends import Backends

LEAST = 4
"""Requests under way, and as many that wait, however few places the stages have: together the eight that one of our
clients has under way at once."""
RETRY_AFTER_S = 1.0


class Places:
    """The places of a gateway's requests, by what they make. under_way, waiting: as of `Admission`, of all requests."""

    def __init__(
        self, config: GatewayConfig, deployed: PipelineConfig, backends: Backends, draining: asyncio.Event
    ) -> None:
        """draining: once set, nothing new is admitted."""
        self._backends, self._wait_s = backends, config.batch_timeout_s
        queue = partial(Admission, "the gateway", wait_s=self._wait_s, retry_after_s=RETRY_AFTER_S, draining=draining)
        stages = {output: tuple(stage.model_stage for stage in deployed.path(output)) for output in ("text", "image")}
        if config.max_requests is not None:
            most, settings = config.max_requests, "--max-requests or --batch-timeout"
            self._queues = dict.fromkeys(stages.values(), queue(limit=most, max_waiting=most, settings=settings))
        else:
            settings = "--max-num-seqs of the stages, --max-requests or --batch-timeout"
            self._queues = {
                each: queue(
                    limit=partial(self._limit, each), max_waiting=partial(self._most_waiting, each), settings=settings
                )
                for each in stages.values()
            }
        self._of = {output: self._queues[each] for output, each in stages.items()}

    def of(self, modality: Modality | None) -> Admission:
        """The queue of a request; None: one whose modality cannot be read, and which is refused once it is."""
        return self._of["image" if modality is not None and modality.makes_image else "text"]

    @property
    def under_way(self) -> int:
        return sum(queue.under_way for queue in self._all)

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self._all)

    def refill(self) -> None:
        """Give places that the stages have got to requests that wait."""
        for queue in self._all:
            queue.refill()

    @property
    def _all(self) -> set[Admission]:
        return set(self._queues.values())

    def _limit(self, stages: tuple[str, ...]) -> int:
        # The sum: while some are drawn the next ones are read, so that no stage waits for another.
        return max(LEAST, self._backends.places(stages))

    def _most_waiting(self, stages: tuple[str, ...]) -> int:
        # Who lets requests wait longer wants more of them to wait.
        return int(self._limit(stages) * max(1.0, self._wait_s / BATCH_TIMEOUT_S))
