"""The errors that users see.

    BagelError                      the base; knows its gRPC status and HTTP code
    ├── InvalidRequest              a request that cannot be served as it is written (names the field)
    │   └── InvalidImage            an input image that cannot be read or is too large
    ├── ConfigError                 a deploy file, flag or setting of the server that is wrong
    ├── CheckpointError             model files that are missing, odd or do not fit the configuration
    ├── NotSupported                a known option that does not exist in this version
    ├── IncompleteContext           K/V that a picture needs is not there
    ├── NotFinite                   a result that overflowed
    ├── InitTimeout                 a stage that was not ready in time
    └── OutOfMemory                 a device without memory for what was asked

Each message says what was wrong, the value seen and what would be right, in one line.
"""

from __future__ import annotations

from typing import ClassVar


class BagelError(Exception):
    """Base of all errors that are meant for a user.

    grpc_status names a member of grpc.StatusCode; http_status is the REST front's code;
    exit_code is the command line's.
    """

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1


class InvalidRequest(BagelError):
    """A request that cannot be served as written; `field` is its field's name in the request."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    exit_code = 2

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidImage(InvalidRequest):
    """An input image that cannot be read, decoded or is too large."""


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


class NotFinite(BagelError):
    """A result with infinite or undefined values, which is never passed on as a picture."""


class InitTimeout(BagelError):
    """A stage that was not ready within --init-timeout."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class OutOfMemory(BagelError):
    """The device has no memory left for what was asked."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 503
