"""What the Thinker's server needs of an engine."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from bagel.engine.segments import ChainPlanner
from bagel.engine.text_scheduler import Reading
from bagel.kv.store import KvStore
from bagel.v1 import common_pb2
from bagel_thinker.watchdog import Pulse


class Engine(Protocol):
    """Builds contexts, hands each layer's K/V to the store as it is computed, writes text if asked.

    A reading's callbacks are called from the engine's own thread. K/V go to the segments of the store that a lease
    has reserved; nothing is stored for the others. failed: gets an EngineDied once the engine can compute no more.
    pulse: of that thread, which is called NAME-engine.
    """

    name: str
    store: KvStore
    planner: ChainPlanner
    info: common_pb2.ModelInfo
    failed: Future[None]
    pulse: Pulse

    def submit(self, reading: Reading) -> None:
        """Take a reading on."""

    def cancel(self, reading: Reading) -> None:
        """Drop a reading; nothing if it is over. It is not heard of again."""

    def close(self) -> None:
        """Stop; readings under way end with an error."""
