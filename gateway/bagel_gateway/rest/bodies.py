"""Bodies as dictionaries: JSON objects, and forms with files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from bagel.errors import InvalidRequest
from bagel_gateway.rest.errors import WrongMediaType

MAX_FIELDS = 64
MAX_FILES = 8
"""Some more than are served, so that too many are refused by their own message."""
MAX_FIELD_BYTES = 2 * 2**20
LISTS = ("cfg_interval", "stop_token_ids")
"""Fields that are lists: given as NAME[] for each of its values, or as one JSON list."""


async def read_json(request: Request) -> dict[str, Any]:
    """A JSON object; raises InvalidRequest for anything else."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongMediaType("body", f"the body is {kind!r:.80}; this endpoint reads application/json")
    body = await request.body()
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body", f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("body", f"the body is a JSON {type(data).__name__}; it must be an object")
    return data


async def read_form(
    request: Request, files: Sequence[str], ignored_files: Sequence[str]
) -> tuple[dict[str, Any], list[bytes]]:
    """Fields of a form, and the contents of its files called `files` in their order.

    ignored_files: fields that may be files too, given as their names alone, for who refuses them.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise WrongMediaType("body", f"the body is {kind!r:.80}; this endpoint reads multipart/form-data")
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        raise InvalidRequest("body", f"the form cannot be read: {error.detail}") from None
    try:
        fields: dict[str, Any] = {}
        contents: list[bytes] = []
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if isinstance(value, UploadFile) and name in files:
                contents.append(await value.read())
            elif name in files or (isinstance(value, UploadFile) and name not in ignored_files):
                wanted = "a file" if name in files else "a value, not a file"
                raise InvalidRequest(name, f"{name} must be {wanted}")
            else:
                _add(fields, key, name, value.filename if isinstance(value, UploadFile) else value)
    finally:
        await form.close()
    return fields, contents


def _add(fields: dict[str, Any], key: str, name: str, value: str | None) -> None:
    if name in LISTS:
        fields.setdefault(name, []).extend(_list(name, value or "") if key == name else [value])
    elif key in fields:
        raise InvalidRequest(key, f"{key} is given twice; send it once")
    else:
        fields[key] = value


def _list(name: str, value: str) -> list[Any]:
    """A JSON list, or one of its values."""
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRequest(name, f"{name} is {value!r:.80}; write a list, like [0.4, 1.0]") from None
    return read if isinstance(read, list) else [read]
