"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from bagel.errors import BagelError, Busy, InvalidRequest, NotFinite, Unauthenticated, together

_LONGEST = 4000
_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


class UnknownModel(BagelError):
    """A model that is not served; the message lists those that are."""

    grpc_status = "NOT_FOUND"
    http_status = 404
    field = "model"


class BodyTooLarge(InvalidRequest):
    """A body of more bytes than are read."""

    http_status = 413


class BodyTooSlow(InvalidRequest):
    """A body that does not come, or comes too slowly."""

    http_status = 408


class WrongHost(BagelError):
    """A request to a host name that the front is not called by, as a web page makes that has rebound its own."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 421


class ForeignOrigin(BagelError):
    """A request that a web page of another site had a browser make."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403


class WrongMediaType(InvalidRequest):
    """A body of another type than the endpoint reads."""

    http_status = 415


class UnknownParameter(InvalidRequest):
    """A parameter that no endpoint has, or not this one."""


class ClientGone(Exception):
    """The client has closed the connection; nobody reads the answer."""


def error_body(error: BagelError) -> dict[str, Any]:
    """The body of an error."""
    code = status_of(error)
    kind = _TYPES.get(code, "invalid_request_error" if code < 500 else "server_error")
    param = error.field if isinstance(error, InvalidRequest | UnknownModel) else None
    return {"error": {"message": _unicode(str(error)), "type": kind, "param": _unicode(param), "code": _code(error)}}


def error_response(error: BagelError) -> JSONResponse:
    """The whole response; one that asks to come back later says when, one that asks for a key says how it is sent."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Busy):
        # Whole seconds, as HTTP has them, and never 0: a client would be back at once.
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(error_body(error), status_of(error), headers)


def status_of(error: BagelError) -> int:
    """The HTTP status. A picture that overflowed did so by the settings that the client chose."""
    return 400 if isinstance(error, NotFinite) else error.http_status


def renamed(error: InvalidRequest, names: Mapping[str, str], size: str | None = None) -> InvalidRequest:
    """The error with its fields as the client calls them, each once; size: the client's, of height and width."""
    problems: dict[tuple[str, str], InvalidRequest] = {}
    for each in (error, *error.also):
        name = names.get(each.field, each.field)
        problem = type(each)(each.field, each.message, each.index).named(names)
        if name == "size" and each.message.startswith(f"{each.field} is "):
            problem = type(each)(name, f"size is {size}: its {each.message}")
        # Several fields may have one name here, and the same problem.
        problems.setdefault((name, problem.message), problem)
    return together([*problems.values()])


def _unicode(text: str | None) -> str | None:
    """What UTF-8 can say, and no more than is read: what a client sent may have lone surrogates."""
    return text and text[:_LONGEST].encode("utf-8", "backslashreplace").decode()


def _code(error: BagelError) -> str:
    match error:
        case UnknownModel():
            return "model_not_found"
        case UnknownParameter():
            return "unknown_parameter"
        case BodyTooLarge():
            return "request_too_large"
        case InvalidRequest():
            return "invalid_value"
        case Unauthenticated():
            return "invalid_api_key"
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
