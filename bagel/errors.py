"""The errors that users see.

    BagelError                      the base; knows its gRPC status and HTTP code
    ├── InvalidRequest              a request that cannot be served as it is written (names the field)
    │   └── InvalidImage            an input image that cannot be read or is too large
    ├── RequestTooSlow              a request that did not come in time
    ├── Unauthenticated             a caller without an API key that the gateway knows
    ├── Forbidden                   a caller whose certificate is not one that this service takes calls of
    ├── ConfigError                 a deploy file, flag or setting of the server that is wrong
    ├── CheckpointError             model files that are missing, odd or do not fit the configuration
    ├── NotSupported                a known option that does not exist in this version
    ├── IncompleteContext           K/V that a picture needs is not there
    │   └── UnknownSegment          K/V that a peer asks for and that is not held here
    ├── ContextRefused              K/V that its holder does not give
    │   ├── ForeignContext          it belongs to another model, type or layout
    │   └── LeaseLapsed             its lease has run out
    ├── KvTimeout                   K/V that did not arrive in time
    ├── SourceUnavailable           the peer that holds K/V cannot be reached
    ├── NotFinite                   a result that overflowed
    ├── InitTimeout                 a stage that was not ready in time
    ├── Busy                        no room for the request now (says when to try again)
    │   └── StoreFull               a K/V store whose memory running requests hold
    ├── Draining                    a service that is shutting down
    ├── Loading                     a service whose model is not loaded yet
    ├── NoBackend                   no service of a stage that a request needs is ready
    ├── RunnerDied                  a worker process that ended under its requests
    ├── EngineDied                  an engine that can compute no more
    ├── RemoteError                 an error of a peer that has no name here (keeps its status)
    ├── NotRead                     an answer that its client does not read
    ├── OutputFailed                a result that is there and cannot be written, as the disk is full
    └── OutOfMemory                 a device without memory for what was asked

Each message says what was wrong, the value seen and what would be right, in one line.
"""

from __future__ import annotations

from typing import Self


class BagelError(Exception):
    """Base of all errors that are meant for a user.

    grpc_status names a member of grpc.StatusCode; http_status is the REST front's code;
    exit_code is the command line's. hidden: what the log alone gets, as it may name addresses of the inside.
    """

    grpc_status: str = "INTERNAL"
    http_status: int = 500
    exit_code: int = 1
    hidden: str = ""

    def for_log(self) -> dict[str, str]:
        """Fields of a log's line about it."""
        return {"error": str(self)} | ({"details": self.hidden} if self.hidden else {})


class InvalidRequest(BagelError):
    """A request that cannot be served as written; `field` is its field's name in the request.

    index: which it was of several that were asked for together, from 0; None where that is not known.
    """

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    exit_code = 2

    def __init__(self, field: str, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.field, self.index = field, index

    def named(self, name: str) -> Self:
        """The error with its field as a front calls it, also where the message begins with it."""
        message = str(self)
        told = name + message.removeprefix(self.field) if message.startswith(f"{self.field} ") else message
        return type(self)(name, told, self.index)


class InvalidImage(InvalidRequest):
    """An input image that cannot be read, decoded or is too large."""


class RequestTooSlow(BagelError):
    """A request whose bytes did not come in time."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 408


class Unauthenticated(BagelError):
    """A caller who has shown no API key where one is needed, or one that is not known."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    exit_code = 2


class Forbidden(BagelError):
    """A caller who is known by their certificate, and may not call this service."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    exit_code = 2


class ConfigError(BagelError):
    """A deploy file, flag or server setting that is wrong."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 500
    exit_code = 2


class CheckpointError(BagelError):
    """Model files that are missing, odd or do not fit their configuration."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 500
    exit_code = 2


class NotSupported(BagelError):
    """A known option that does not exist in this version; the message names what to use instead."""

    grpc_status = "UNIMPLEMENTED"
    http_status = 501
    exit_code = 2


class IncompleteContext(BagelError):
    """K/V that a picture is drawn from is missing; nothing is recomputed behind the user's back."""

    grpc_status = "DATA_LOSS"
    http_status = 500


class UnknownSegment(IncompleteContext):
    """K/V that is not held here: never asked for, evicted, or failed."""

    grpc_status = "NOT_FOUND"


class ContextRefused(BagelError):
    """K/V that its holder does not give."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 503


class ForeignContext(ContextRefused):
    """K/V of another checkpoint, K/V type, tokenizer, image transform or layout."""


class LeaseLapsed(ContextRefused):
    """The lease that kept K/V alive has run out or went with its service, and what it held may be gone."""

    grpc_status = "UNAVAILABLE"  # the same request, sent again, gets a new one


class KvTimeout(BagelError):
    """Nothing came from the holder of K/V for the configured time, neither a page nor a sign of life."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class SourceUnavailable(BagelError):
    """The peer that holds K/V cannot be reached, or went away while it sent them."""

    grpc_status = "UNAVAILABLE"
    http_status = 503

    def __init__(self, message: str, hidden: str = "") -> None:
        super().__init__(message)
        self.hidden = hidden


class NotFinite(BagelError):
    """A result with infinite or undefined values, which is never passed on as a picture."""


class InitTimeout(BagelError):
    """A stage that was not ready within --init-timeout."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class Busy(BagelError):
    """No room for the request now; retry_after_s says when to try again."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreFull(Busy):
    """The K/V store has no room now: all of it is held by requests that run."""

    http_status = 503


class Draining(BagelError):
    """A service that takes no new requests, as it is shutting down."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class NoBackend(BagelError):
    """No service of a stage that the request needs is ready; the message names those configured."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class Loading(BagelError):
    """A service that cannot serve yet, as it loads its model."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class RunnerDied(BagelError):
    """A service's worker process ended while it served requests; a new one is started."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class EngineDied(BagelError):
    """A service's engine can compute no more; the service ends, to be started again."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class RemoteError(BagelError):
    """An error of a peer that this tree has no class for; it keeps the peer's gRPC status."""

    def __init__(self, message: str, grpc_status: str, hidden: str = "") -> None:
        super().__init__(message)
        self.grpc_status, self.hidden = grpc_status, hidden
        self.http_status = _HTTP.get(grpc_status, 500)


class NotRead(BagelError):
    """An answer that its client does not read: its call was ended."""

    grpc_status = "ABORTED"
    http_status = 408


class OutOfMemory(BagelError):
    """The device has no memory left for what was asked."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 503


class OutputFailed(BagelError):
    """A result that cannot be written, though the place for it is right: the disk is full, or fails."""


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
"""HTTP codes of gRPC statuses, as google.rpc.Code has them."""
