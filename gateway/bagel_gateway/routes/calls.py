"""The answers of a stage as they come, and how a call ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc

from bagel.errors import BagelError, Draining, EngineDied, Loading, RemoteError, RunnerDied
from bagel.rpc.errors import from_rpc_error
from bagel_gateway.backend import Backend
from bagel_gateway.uploads import Answers

R = TypeVar("R")


async def responses(call: Answers[R], backend: Backend) -> AsyncIterator[R]:
    """A call's responses; its errors become BagelErrors. The call is cancelled when the caller leaves.

    Raises TransferDamaged at the end of a call whose bytes are not the same at both ends, RemoteError if the backend
    falls silent. gRPC alone would wait for ever: a stopped process, or a network that drops packets, ends no call.
    """
    try:
        with backend.waiting(call.cancel):  # which ends the reading
            async for response in call:
                yield response
    except asyncio.CancelledError:
        if backend.silent.is_set() and not _leaving():
            raise RemoteError(f"{backend.name} has not answered for {backend.silence_s:g} s", "UNAVAILABLE") from None
        raise
    except grpc.RpcError as error:
        failed = from_rpc_error(error, backend.name, inside=True)
        if is_unreachable(failed) or isinstance(failed, Draining | EngineDied | Loading | RunnerDied):
            backend.lost(str(failed), failed.hidden)  # the next request need not find out by itself
        raise failed from None
    finally:
        # Also when the reader leaves early: the stage's work ends with it.
        call.cancel()


def result_of(result: R | None, backend: Backend, what: str) -> R:
    """The last event of a call; RemoteError if it ended without."""
    if result is None:
        raise RemoteError(f"{backend.name} ended a {what} without its result", "INTERNAL")
    return result


def is_unreachable(error: BagelError) -> bool:
    """Whether a service could not be reached at all."""
    return isinstance(error, RemoteError) and error.grpc_status == "UNAVAILABLE"


def _leaving() -> bool:
    """Whether the task that runs this is itself cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
