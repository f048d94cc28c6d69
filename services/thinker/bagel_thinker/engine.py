"""What the Thinker's server needs of an engine."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from PIL.Image import Image

from bagel.engine.segments import ChainPlanner
from bagel.engine.text_scheduler import ContextRequest
from bagel.errors import BagelError, EngineDied
from bagel.kv.store import KvStore
from bagel.v1 import common_pb2
from bagel_thinker.watchdog import Pulse


class Engine(Protocol):
    """Builds contexts, hands each layer's K/V to the store as it is computed, writes text if asked.

    A request's events are emitted on threads of the engine's own, one after the other. K/V go to the segments of the
    store that a lease has reserved; nothing is stored for the others. failed: gets an EngineDied once the engine can
    compute no more.
    pulse: of the thread that computes, which is called NAME-engine.
    """

    name: str
    store: KvStore
    planner: ChainPlanner
    info: common_pb2.ModelInfo
    failed: Future[None]
    pulse: Pulse

    def encode_ahead(self, image: Image) -> Future[None] | None:
        """Encode an image, resized for the VAE, before the request comes whose segment has this very object.

        May be cancelled as long as it has not begun; an error of it is the request's too. None where images are encoded
        with their request alone. From any thread.
        """

    def submit(self, request: ContextRequest) -> None:
        """Start a request."""

    def cancel(self, request: ContextRequest) -> None:
        """Drop a request; nothing if it is over. It emits nothing more."""

    def close(self) -> None:
        """Stop; requests under way end with an error."""


def died() -> EngineDied:
    """The error that callers get from an engine that can compute no more."""
    return EngineDied("the Thinker's engine cannot go on, and the service ends; its log has the details; try again")


def internal_error(cause: Exception) -> BagelError:
    """The error that callers get for a failure that no request caused."""
    return BagelError(f"internal error of the engine: {type(cause).__name__}; the log of this service has the details")
