"""A peer whose K/V are pulled: its messages as they come, and what the end of its stream means. No torch here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio

from bagel.errors import BagelError, KvTimeout, Loading, SourceUnavailable, TransferDamaged
from bagel.kv.lease_keeper import PeerLessor
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.integrity import Digest
from bagel.telemetry.logs import request_metadata
from bagel.v1 import kv_pb2

SERVICE = kv_pb2.DESCRIPTOR.services_by_name["KvBlocksService"].full_name
PULL = f"/{SERVICE}/Pull"
LOST = ("UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED")
"""Statuses that a transport ends a stream with: the last one for a message length that was damaged on its way.

Only this side's task cancels without a status.
"""
DETAILS = "grpc-status-details-bin"


class Source:
    """One peer. lessor: where its leases are renewed and given back."""

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self.name, self.lessor = name, PeerLessor(name, channel)
        # Without a deserializer: bytes that are damaged must not break the call, and protobuf would copy the payload.
        self._pull: Any = channel.unary_stream(
            PULL, request_serializer=kv_pb2.PullRequest.SerializeToString, response_deserializer=None
        )

    async def pull(self, request: kv_pb2.PullRequest, silence_s: float) -> AsyncGenerator[bytes, None]:
        """The messages of one Pull, as bytes, until its stream ends.

        Raises KvTimeout after silence_s without one, SourceUnavailable for a stream that breaks, else what the source
        says. Close it (`contextlib.aclosing`) if it is left early.
        """
        call, sent = self._pull(request, metadata=request_metadata()), Digest(PULL, request.SerializeToString())
        try:
            while (data := await self._read(call, silence_s)) is not None:
                yield data
        except grpc.aio.AioRpcError as error:
            try:
                sent.check_failed(error, self.name)
            except TransferDamaged as damaged:  # the error is about another request, as of a segment that nobody has
                raise SourceUnavailable(str(damaged)) from error
            raise source_error(error, self.name) from error
        finally:
            # A stream that is left early would go on sending otherwise.
            call.cancel()

    async def _read(self, call: Any, silence_s: float) -> bytes | None:
        """The next message; None at the end of the stream. Raises KvTimeout, or gRPC's error."""
        try:
            async with asyncio.timeout(silence_s):
                data = await call.read()
        except TimeoutError:
            raise KvTimeout(
                f"nothing came from {self.name} for {silence_s:g} s, no page of K/V and no sign of life; see whether "
                "it and the network to it are alive"
            ) from None
        return None if data is grpc.aio.EOF else data


def source_error(error: grpc.aio.AioRpcError, source: str) -> BagelError:
    """What the end of a call with a source means: what the source says, or that it cannot be reached."""
    # A service's own error carries details; one that the transport made does not.
    has_details = any(key == DETAILS for key, _ in error.trailing_metadata() or ())
    if not has_details and error.code().name in LOST:
        return SourceUnavailable(
            f"the connection to {source} broke while K/V were fetched from it ({error.code().name}); the log has the "
            "details",
            hidden=str(error.details()),
        )
    cause = from_rpc_error(error, source, inside=True)
    if isinstance(cause, Loading):  # of the source, not of this service: its callers would take it for ours
        return SourceUnavailable(f"{source} was started again while K/V were fetched from it: {cause}")
    return cause
