"""Read a checkpoint's JSON strictly: anything odd is a CheckpointError that names the file. No torch here."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any, NoReturn

from bagel.errors import CheckpointError

LARGEST_BYTES = 16 * 2**20
"""Largest configuration file or safetensors header. The public model's largest has a hundredth of this."""
DEEPEST = 32
"""Deepest nesting of lists and objects. The public model's files have four levels."""

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shown(value: object) -> str:
    """A value from a file, shortened for an error message."""
    return _repr.repr(value)


def shown_name(name: str) -> str:
    """A tensor's name for an error message, shortened or escaped if it is long or would not fit in one line."""
    return name if name.isprintable() and len(name) <= 160 else shown(name)


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError, naming the file, for anything else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_BYTES + 1)  # one more than allowed shows that the file is too large
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_BYTES:
        raise CheckpointError(f"{path} has more than {LARGEST_BYTES} bytes; a configuration file was expected")
    try:
        return parse_json_object(data)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    except TypeError as error:
        raise CheckpointError(f"{path} {error}; a JSON object was expected") from None


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError unless it is strict, shallow JSON, TypeError for another kind of value.

    Refuses repeated keys, NaN and Infinity, which Python's reader would silently accept.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    if not isinstance(value, dict):
        raise TypeError(f"holds {type(value).__name__}")
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _check_depth(value: dict[str, Any]) -> None:
    """Refuse deep nesting, which means nothing here and would make later recursive readers fail."""
    level: list[Any] = [value]  # level by level instead of recursively, so that this check cannot fail that way
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [each for items in inner for each in items if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")
