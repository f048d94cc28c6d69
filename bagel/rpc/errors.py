"""Errors on the wire: a BagelError to a gRPC status with google.rpc details, and back. No torch here."""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata, ServicerContext
from grpc_status import rpc_status

from bagel import errors
from bagel.errors import SERVER_FAULTS, BagelError, Busy, InvalidRequest, OutOfMemory, RemoteError
from bagel.rpc.integrity import CURRENT
from bagel.rpc.structure import MAX_FIELDS, check_fields
from bagel.telemetry.logs import Log, adopt_request_id
from bagel.telemetry.metrics import timed_call
from bagel.telemetry.tracing import record_failure, serving

DOMAIN = "bagel-serving"
_Violation = error_details_pb2.BadRequest.FieldViolation
_DETAILS = "grpc-status-details-bin"
_LOG = "the log of the service that called it has the details"
_INSIDE = {
    "UNAVAILABLE": "cannot be reached",
    "DEADLINE_EXCEEDED": "did not answer in time",
    "RESOURCE_EXHAUSTED": "has no room for the call, or its message is too large",
    "UNIMPLEMENTED": "does not know the call; run the same release of both",
    "UNAUTHENTICATED": "refuses the service that called it",
    "PERMISSION_DENIED": "refuses the service that called it",
}
"""What a caller gets if a call between services ended without a status of this tree."""
_BROKEN = frozenset({"UNKNOWN", "INTERNAL"})
"""Statuses that gRPC itself ends a call with when it cannot make sense of its connection."""
_OURS = "Locally cancelled by application!"
"""What gRPC says of a call that this side cancelled."""

log = Log("bagel.status")
Q = TypeVar("Q")
R = TypeVar("R")


def rpc_status_of(error: BagelError) -> status_pb2.Status:
    """The google.rpc.Status of an error: its code, its message, its class as ErrorInfo, fields, retry delay."""
    code: int = grpc.StatusCode[error.grpc_status].value[0]
    status = status_pb2.Status(code=code, message=str(error))
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    details: list[Any] = [info]
    if isinstance(error, InvalidRequest):
        details.append(error_details_pb2.BadRequest(field_violations=_violations(error)))
    if isinstance(error, Busy):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        details.append(retry)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _violations(error: InvalidRequest) -> list[Any]:
    """One for each of the request's fields that is wrong."""
    first = _Violation(field=error.field, description=error.message)
    return [first, *(violation for each in error.also for violation in _violations(each))]


async def abort(context: ServicerContext[Any, Any], error: BagelError) -> None:
    """End a call with an error's status; does not return."""
    status = rpc_status_of(error)
    digest = CURRENT.get()
    held_against = () if digest is None else digest.metadata
    context.set_trailing_metadata(Metadata((_DETAILS, status.SerializeToString()), *held_against))
    await context.abort(grpc.StatusCode[error.grpc_status], str(error))


def from_rpc_error(error: grpc.RpcError, peer: str, *, inside: bool = False) -> BagelError:
    """The error that a call to a peer ended with: as it was raised there, or a RemoteError with its status.

    inside: the call was between services. The transport's text names addresses, so only the log gets it.
    """
    status = _status(error)
    if status is None:
        code = _code(error)
        if code is grpc.StatusCode.CANCELLED and _message(error) != _OURS:
            # A server that stops drops a call that it has only just received.
            return RemoteError(f"{peer} ended the call, as it does when it stops; try again", "UNAVAILABLE")
        if code.name in _BROKEN:
            # Our services give their errors details: one without is of a connection that broke, or was damaged.
            return _unnamed(
                peer, "UNAVAILABLE", f"the connection broke ({code.name}: {_message(error)})", inside=inside
            )
        return _unnamed(peer, code.name, _message(error), inside=inside)
    return from_status(status, peer, inside=inside)


def _unnamed(peer: str, code: str, message: str, *, inside: bool) -> RemoteError:
    """An error from outside this tree: of the transport, or of a proxy."""
    if not inside:
        return RemoteError(f"{peer}: {message or code}", code)
    return RemoteError(f"{peer} {_INSIDE.get(code, f'broke the call off ({code})')}; {_LOG}", code, hidden=message)


def from_status(status: status_pb2.Status, peer: str, *, inside: bool = False) -> BagelError:
    """The error that a peer's `rpc_status_of` wrote; a RemoteError if this tree has no such class."""
    code = next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    with suppress(DecodeError):  # damaged on its way
        for detail in status.details:
            for message_of in (info, bad, retry):
                # Unpack leaves a message of another type as it is.
                detail.Unpack(message_of)
    # The name comes from a peer, so it counts only if it is a class of our own tree.
    kind = getattr(errors, info.reason, None) if info.domain == DOMAIN else None
    if not (isinstance(kind, type) and issubclass(kind, BagelError)):
        return _unnamed(peer, code.name, status.message, inside=inside)
    if issubclass(kind, InvalidRequest):
        first, *others = bad.field_violations or [_Violation(field="request", description=status.message)]
        return kind(first.field, first.description, also=[InvalidRequest(o.field, o.description) for o in others])
    if issubclass(kind, Busy):
        return kind(status.message, retry.retry_delay.ToMilliseconds() / 1000)
    return RemoteError(status.message, code.name) if kind is RemoteError else kind(status.message)


@dataclass(frozen=True)
class Undecodable:
    """A request whose bytes are no message of its type. `unary` and `streaming` refuse it in their servicer's place."""

    why: str


def decoding(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A request's deserializer that gives an Undecodable for wrong bytes: gRPC would answer UNKNOWN, as for a bug."""
    kind = getattr(getattr(read, "__self__", None), "DESCRIPTOR", None)
    limit = None if kind is None else MAX_FIELDS.get(kind.full_name)

    def decode(data: bytes) -> Any:
        try:
            if kind is not None and limit is not None:
                check_fields(data, kind, limit)
            return _known(read(data))
        except DecodeError as error:
            return Undecodable(str(error))

    return decode


def _known(message: Any) -> Any:
    """The message, or an Undecodable if it has fields of another release: what they ask for would be left undone."""
    if isinstance(message, Message):
        nbytes = message.ByteSize()
        message.DiscardUnknownFields()  # nested ones too
        if message.ByteSize() != nbytes:
            return Undecodable("it has fields that this release does not know; run the same release on both sides")
    return message


def unary(handler: Callable[[Any, Q, Any], Awaitable[R]]) -> Callable[[Any, Q, Any], Awaitable[R]]:
    """A servicer's unary method whose errors become statuses, under the call's request id, counted."""
    name = _method(handler)

    @wraps(handler)
    async def handle(self: Any, request: Q, context: ServicerContext[Any, Any]) -> R:
        adopt_request_id(context)
        with timed_call(name) as call:
            try:
                _check_decoded(request)
                return await handler(self, request, context)
            except Exception as error:
                reported = _reported(error)
                call.status = reported.grpc_status
                await abort(context, reported)
                raise

    return handle


def streaming(handler: Callable[[Any, Q, Any], AsyncIterator[R]]) -> Callable[[Any, Q, Any], AsyncIterator[R]]:
    """As `unary`, for a method that streams its responses; the call is a span of its request's trace."""
    name = _method(handler)

    @wraps(handler)
    async def handle(self: Any, request: Q, context: ServicerContext[Any, Any]) -> AsyncIterator[R]:
        request_id = adopt_request_id(context)
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        failed: BagelError | None = None
        with serving(name, metadata, request_id=request_id) as span, timed_call(name) as call:
            responses = handler(self, request, context)
            try:
                _check_decoded(request)
                async for response in responses:
                    yield response
            except Exception as error:
                failed = _reported(error)
                call.status = failed.grpc_status
                span.set_attribute("rpc.response.status_code", failed.grpc_status)
                record_failure(span, failed, fault=failed.grpc_status in SERVER_FAULTS)
            finally:
                await responses.aclose()  # type: ignore[attr-defined]
        if failed is not None:  # last: a client that reads nothing does not take this either
            await abort(context, failed)

    return handle


def _check_decoded(request: object) -> None:
    if isinstance(request, Undecodable):
        raise InvalidRequest(
            "request", f"the request cannot be read: {request.why}; build it from the protos of bagel.v1"
        )


def _method(handler: Callable[..., object]) -> str:
    """The full name of the method that a servicer's handler serves."""
    servicer, _, method = handler.__qualname__.rpartition(".")
    return f"bagel.v1.{servicer.replace('Servicer', 'Service')}/{method}"


def _reported(error: Exception) -> BagelError:
    """The error that the caller gets. Anything but a BagelError is a bug: the log has it whole, the caller its type."""
    if isinstance(error, BagelError):
        log.info("refused" if error.grpc_status == "INVALID_ARGUMENT" else "failed", **error.for_log())
        return error
    if isinstance(error, grpc.RpcError):
        return _reported(from_rpc_error(error, "another service", inside=True))
    if isinstance(error, asyncio.TimeoutError):
        return RemoteError("the deadline passed", "DEADLINE_EXCEEDED")
    if (shortage := _shortage(error)) is not None:
        log.warning("the machine gives this service no more", exc_info=True)
        return shortage
    log.error("internal error", exc_info=True)
    return BagelError(f"internal error: {type(error).__name__}; the log of this service has the details")


def _shortage(error: Exception) -> BagelError | None:
    """What the machine refuses this process for now, if an error says so: it is no bug, and no fault of a caller."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return OutOfMemory("the service's machine has too little memory for the request now; try again later")
    threads = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    if threads or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN)):
        return Busy(
            "the service may open no more files, or start no more threads, now; try again later, or raise its limits "
            "(ulimit -n, ulimit -u, and memory)"
        )
    return None


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = error.code()
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _message(error: grpc.RpcError) -> str:
    return str(error.details() or "")


def _status(error: grpc.RpcError) -> status_pb2.Status | None:
    try:
        if not isinstance(error, AioRpcError):
            return rpc_status.from_call(error)
        for key, value in error.trailing_metadata() or ():
            if key == _DETAILS:
                return status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
    except (DecodeError, ValueError):  # damaged on its way: the status itself is told
        pass
    return None
