"""Bodies as dictionaries: JSON objects, and forms with files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from bagel.deployment.http_front import HttpFront
from bagel.errors import InvalidRequest
from bagel_gateway.rest.errors import WrongMediaType
from bagel_gateway.rest.forms import FormReader
from bagel_gateway.rest.structure import Structure

LISTS = ("cfg_interval", "stop_token_ids")
"""Fields that are lists: given as NAME[] for each of its values, or as one JSON list."""
SMALL = 2**18
"""Bytes of JSON that are parsed at once, in a millisecond or two."""
_NARROW = bytes(range(0xF0))
"""Bytes of UTF-8 characters that Python holds in two bytes or one."""


class Bodies:
    """Reads what requests carry, within the front's limits."""

    def __init__(self, guards: HttpFront) -> None:
        self._guards = guards
        # One thread: a parsed body is several times as large for a moment, and the parser lets nothing run beside it.
        self._parser = ThreadPoolExecutor(1, "parse JSON")

    async def read_json(self, request: Request) -> dict[str, Any]:
        """A JSON object; raises InvalidRequest for anything else."""
        _check_type(request, "application/json")
        structure, body, most = self._structure(), bytearray(), 2 * max(self._guards.max_body_bytes, SMALL)
        async for piece in request.stream():
            # Counted before it is kept, so that a body that is refused takes no more memory.
            structure.feed(piece)
            body += piece
        if len(body) <= SMALL:
            return _object(body, most)
        return await asyncio.get_running_loop().run_in_executor(self._parser, _object, body, most)

    async def read_form(
        self,
        request: Request,
        files: Sequence[str],
        known: Collection[str],
        ignored_files: Collection[str],
        repeated: Collection[str] = (),
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Fields of a form, and the contents of its files called `files` in their order.

        known: names of fields. A field of another name is refused later, by its name, so nothing else of it is checked.
        ignored_files: fields that may be files too, of which the file's name is given; they are refused later as well.
        repeated: fields that may come more than once, given as lists.
        """
        _check_type(request, "multipart/form-data")
        reader = FormReader(request.headers["content-type"])
        async for piece in request.stream():
            reader.feed(piece)
        fields: dict[str, Any] = {}
        contents: list[bytes] = []
        for part in reader.end():
            name = part.name.removesuffix("[]")
            if part.filename is not None and name in files:
                contents.append(bytes(part.data))
            elif name in repeated:
                fields.setdefault(name, []).append(part.text())
            elif name not in known and name not in files:
                fields.setdefault(part.name, part.text() if part.filename is None else part.filename)
            elif name in files or (part.filename is not None and name not in ignored_files):
                wanted = "a file" if name in files else "a value, not a file"
                raise InvalidRequest(name, f"{name} must be {wanted}")
            else:
                self._add(fields, part.name, name, part.text() if part.filename is None else part.filename)
        return fields, contents

    def _add(self, fields: dict[str, Any], key: str, name: str, value: str) -> None:
        if name in LISTS:
            fields.setdefault(name, []).extend(self._list(name, value) if key == name else [value])
        elif key in fields:
            raise InvalidRequest(key, f"{key} is given twice; send it once")
        else:
            fields[key] = value

    def _list(self, name: str, value: str) -> list[Any]:
        """A JSON list, or one of its values."""
        try:
            self._structure().feed(value.encode())
            read = json.loads(value)
        except InvalidRequest as error:
            raise InvalidRequest(name, f"{name}: {error}") from None
        except (ValueError, RecursionError):
            raise InvalidRequest(name, f"{name} is {value!r:.80}; write a list, like [0.4, 1.0]") from None
        return read if isinstance(read, list) else [read]

    def _structure(self) -> Structure:
        guards = self._guards
        return Structure(guards.max_json_values, guards.max_json_depth, guards.max_text_body_bytes)


def _check_type(request: Request, wanted: str) -> None:
    """Raise WrongMediaType for another Content-Type, or none: what a page of another site may send without asking."""
    content_type = request.headers.get("content-type")
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != wanted:
        said = "says no Content-Type" if content_type is None else f"is {kind!r:.80}"
        raise WrongMediaType("body", f"the body {said}; this endpoint reads {wanted}")


def _object(body: bytearray, most: int) -> dict[str, Any]:
    """most: bytes that its text may take in memory, where one wide character makes all of them wide."""
    wide = 1 if body.isascii() else 4 if body.translate(None, _NARROW) else 2
    if wide * len(body) > most:
        problem = f"the body has {len(body)} bytes and characters that are not ASCII, and would take too much memory"
        raise InvalidRequest("body", f"{problem}; send them as \\u escapes")
    try:
        text = body.decode("utf-8-sig")
        body.clear()  # it is held in one form at a time
        data = json.loads(text)
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InvalidRequest("body", f"the body is not UTF-8: {wrong}; send JSON as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body", f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("body", f"the body is a JSON {type(data).__name__}; it must be an object")
    return data
