"""The errors that users see.

    BagelError                      the base; knows its gRPC status and HTTP code
    ├── InvalidRequest              the request cannot be served as written (names the field)
    │   └── InvalidImage            an input image is unreadable or too large
    ├── RequestTooSlow              the request did not arrive in time
    ├── Unauthenticated             the caller has no API key that the gateway knows
    ├── Forbidden                   the service does not accept calls from the caller's certificate
    ├── ConfigError                 a deploy file, flag or setting of a service is wrong
    ├── CheckpointError             model files are missing, odd or do not fit the configuration
    ├── NotSupported                the option is known but does not exist in this version
    ├── IncompleteContext           K/V that a picture needs is missing
    │   └── UnknownSegment          this store does not hold the K/V that a peer asks for
    ├── ContextRefused              the holder of the K/V refuses to send it
    │   ├── ForeignContext          the K/V belongs to another model, type or layout
    │   └── LeaseLapsed             the lease of the K/V has expired
    ├── KvTimeout                   the K/V did not arrive in time
    ├── TransferDamaged             what was sent is not what arrived
    ├── SourceUnavailable           the peer that holds the K/V cannot be reached
    ├── NotFinite                   a result overflowed
    ├── InitTimeout                 a stage was not ready in time
    ├── Busy                        there is no room for the request now (says when to try again)
    │   └── StoreFull               running requests hold all memory of the K/V store
    ├── Draining                    the service is shutting down
    ├── Loading                     the service has not loaded its model yet
    ├── NoBackend                   no service of a stage that the request needs is ready
    ├── RunnerDied                  a worker process ended while it served requests
    ├── EngineDied                  the engine can compute no more
    ├── RemoteError                 a peer reported an error that this tree has no class for (keeps its status)
    ├── NotRead                     the client does not read its answer
    ├── OutputFailed                a result cannot be written, since the disk is full or fails
    └── OutOfMemory                 the device has too little memory for the request

Each message says in one line what was wrong, the value seen and what would be right. Inside `bagel` it names the
setting as its field (image_workers); each front replaces the field with its own flag or parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

MOST_LISTED = 15
"""How many further problems of one request an error lists; it counts the rest."""
SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""gRPC statuses that are the server's fault, by OpenTelemetry's conventions. The others are the caller's."""


class BagelError(Exception):
    """Base of all errors that are meant for a user.

    grpc_status: the name of a grpc.StatusCode; http_status: the REST front's code; exit_code: the command line's.
    hidden: details for the log alone, since they may name internal addresses.
    """

    grpc_status: str = "INTERNAL"
    http_status: int = 500
    exit_code: int = 1
    hidden: str = ""

    def __reduce__(self) -> tuple[object, ...]:
        """Survives pickling, whatever arguments a subclass is made with."""
        return _restored, (type(self), self.args, self.__dict__)

    def for_log(self) -> dict[str, str]:
        """The error's fields in a log line."""
        return {"error": str(self)} | ({"details": self.hidden} if self.hidden else {})


def _restored(kind: type[BagelError], args: tuple[object, ...], state: dict[str, object]) -> BagelError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidRequest(BagelError):
    """The request cannot be served as written; `field` is the name of the wrong field.

    index: the request's place, from 0, among several that were sent together; None if it is unknown.
    also: further problems of the request, which the text lists after `message`.
    """

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    exit_code = 2

    def __init__(self, field: str, message: str, index: int | None = None, also: Sequence[InvalidRequest] = ()) -> None:
        super().__init__("; ".join([message, *map(str, also)]))
        self.field, self.message, self.index, self.also = field, message, index, tuple(also)

    def named(self, names: Mapping[str, str]) -> Self:
        """The same error with the front's names for the fields, also at the start of a message."""
        name = names.get(self.field, self.field)
        message = self.message
        if message.startswith(f"{self.field} "):
            message = name + message.removeprefix(self.field)
        return type(self)(name, message, self.index, [each.named(names) for each in self.also])


def together(problems: Sequence[InvalidRequest]) -> InvalidRequest:
    """Join several problems into one error, with the class and the field of the first."""
    first, *others = problems
    more = len(others) - MOST_LISTED
    also = [*first.also, *others[:MOST_LISTED]]
    if more > 0:
        also.append(InvalidRequest(first.field, f"and {more} more"))
    return type(first)(first.field, first.message, first.index, also)


class InvalidImage(InvalidRequest):
    """An input image cannot be read or decoded, or is too large."""


class RequestTooSlow(BagelError):
    """The bytes of a request did not arrive in time."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 408


class Unauthenticated(BagelError):
    """The caller sent no API key, or an unknown one, to a gateway that requires keys."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    exit_code = 2


class Forbidden(BagelError):
    """The caller's certificate is valid, but this service does not accept calls from its name."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    exit_code = 2


class ConfigError(BagelError):
    """A deploy file, flag or setting of a service is wrong; `fields` are the settings that the message names."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 500
    exit_code = 2

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


class CheckpointError(BagelError):
    """Model files are missing, odd or do not fit their configuration."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 500
    exit_code = 2


class NotSupported(BagelError):
    """A known option does not exist in this version; the message names what to use instead."""

    grpc_status = "UNIMPLEMENTED"
    http_status = 501
    exit_code = 2


class IncompleteContext(BagelError):
    """K/V that a picture needs is missing; it is never silently recomputed."""

    grpc_status = "DATA_LOSS"
    http_status = 500


class UnknownSegment(IncompleteContext):
    """This store does not hold the K/V: it was never requested, was evicted, or its computation failed."""

    grpc_status = "NOT_FOUND"


class ContextRefused(BagelError):
    """The holder of the K/V refuses to send it."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 503


class ForeignContext(ContextRefused):
    """The K/V belongs to another checkpoint, K/V type, tokenizer, image transform or layout."""


class LeaseLapsed(ContextRefused):
    """The lease of the K/V has expired, or ended with its service; the K/V may be gone."""

    grpc_status = "UNAVAILABLE"  # the same request, sent again, gets a new one


class KvTimeout(BagelError):
    """The holder of the K/V sent neither a page nor a sign of life for the configured time."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class SourceUnavailable(BagelError):
    """The peer that holds the K/V cannot be reached, or disappeared while it sent them."""

    grpc_status = "UNAVAILABLE"
    http_status = 503

    def __init__(self, message: str, hidden: str = "") -> None:
        super().__init__(message)
        self.hidden = hidden


class TransferDamaged(BagelError):
    """What one side of a call sent is not what the other received; nothing of its answer is to be trusted."""

    grpc_status = "UNAVAILABLE"  # the same request, sent again, is likely to arrive whole
    http_status = 503


class NotFinite(BagelError):
    """A result has infinite or undefined values; it is never returned as a picture."""


class InitTimeout(BagelError):
    """A stage was not ready within init_timeout."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504
    fields = ("init_timeout",)


class Busy(BagelError):
    """There is no room for the request now; retry_after_s says when to try again."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreFull(Busy):
    """Running requests hold all memory of the K/V store."""

    http_status = 503


class Draining(BagelError):
    """The service is shutting down and takes no new requests."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class NoBackend(BagelError):
    """No service of a stage that the request needs is ready; the message names the configured ones."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class Loading(BagelError):
    """The service is still loading its model."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class RunnerDied(BagelError):
    """A worker process ended while it served requests; the service starts a new one."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class EngineDied(BagelError):
    """The engine can compute no more; its service ends and has to be started again."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class RemoteError(BagelError):
    """A peer reported an error that this tree has no class for; it keeps the peer's gRPC status."""

    def __init__(self, message: str, grpc_status: str, hidden: str = "") -> None:
        super().__init__(message)
        self.grpc_status, self.hidden = grpc_status, hidden
        self.http_status = _HTTP.get(grpc_status, 500)


class NotRead(BagelError):
    """The client does not read its answer, so its call was ended."""

    grpc_status = "ABORTED"
    http_status = 408


class OutOfMemory(BagelError):
    """The device has too little memory left for the request."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 503


class OutputFailed(BagelError):
    """A result cannot be written, since the disk is full or fails; its path is right."""


_HTTP = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
}
"""HTTP codes of gRPC statuses, as google.rpc.Code documents them."""
