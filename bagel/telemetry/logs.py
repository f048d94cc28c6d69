"""Structured logs: one line of JSON per event, with the request it belongs to, on standard error. No torch here."""

from __future__ import annotations

import json
import logging
import sys
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, cast

from grpc.aio import ServicerContext

from bagel.telemetry.tracing import trace_metadata

REQUEST_ID = "x-request-id"
"""Metadata key that carries a request's id through all services."""
LONGEST_REQUEST_ID = 128

current_request: ContextVar[str] = ContextVar("current_request", default="")
current_caller: ContextVar[str] = ContextVar("current_caller", default="")
"""The name of the request's API key; empty if the gateway requires none."""


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON: time, level, service, event, request_id, caller and its extra fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self.service,
            "event": record.getMessage(),
        }
        if request := current_request.get():
            line["request_id"] = request
        if caller := current_caller.get():
            line["caller"] = caller
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class Log:
    """A logger whose events have fields: `log.info("picture done", seconds=1.2)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        """Log a detail for debugging."""
        self._logger.debug(event, extra={"fields": fields})

    def info(self, event: str, **fields: object) -> None:
        """Log something that went as it should."""
        self._logger.info(event, extra={"fields": fields})

    def warning(self, event: str, **fields: object) -> None:
        """Log something that an operator should know."""
        self._logger.warning(event, extra={"fields": fields})

    def error(self, event: str, *, exc_info: bool | BaseException = False, **fields: object) -> None:
        """Log a failure; exc_info adds the traceback of that exception, or of the one being handled."""
        self._logger.error(event, exc_info=exc_info, extra={"fields": fields})


def set_up_logs(service: str, level: str = "INFO") -> None:
    """Send the logs of this process to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]  # replaces the handlers that a library may have installed on import
    root.setLevel(level)


def new_request_id() -> str:
    """An id for a request that came without one."""
    return uuid.uuid4().hex[:16]


def adopt_request_id(context: ServicerContext[Any, Any]) -> str:
    """Take the request's id from a call's metadata, or make one; the logs of this task carry it from now on."""
    metadata = dict(context.invocation_metadata() or ())
    given = cast(str, metadata.get(REQUEST_ID, ""))[:LONGEST_REQUEST_ID]
    # An unprintable id could forge lines in a log viewer.
    request_id = given if given.isprintable() and given else new_request_id()
    current_request.set(request_id)
    return request_id


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that passes the current request's id and trace on to the next service."""
    request_id = current_request.get()
    return (((REQUEST_ID, request_id),) if request_id else ()) + trace_metadata()
