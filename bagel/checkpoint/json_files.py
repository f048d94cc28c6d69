"""JSON of a checkpoint, read strictly: what is odd in it is a CheckpointError that names the file. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import Repr
from typing import Any, NoReturn

from bagel.errors import CheckpointError

LARGEST_BYTES = 16 * 2**20
"""Of a configuration file or a safetensors header. The public model's largest is a hundredth of it."""
DEEPEST = 32
"""Levels of lists and objects within one another. The public model's files have four."""

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shown(value: object) -> str:
    """A value of a file for an error message: short, whatever it is."""
    return _repr.repr(value)


def shown_name(name: str) -> str:
    """A tensor's name for an error message: as it is, unless it is long or would not stay in one line."""
    return name if name.isprintable() and len(name) <= 160 else shown(name)


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError naming the file for anything else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_BYTES + 1)
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
    """A JSON object; raises ValueError for what is no strict, shallow JSON, and TypeError for another kind of value.

    A key that is there twice, NaN and Infinity are refused: Python's reader would take them without a word.
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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _check_depth(value: dict[str, Any]) -> None:
    """Refuse what is nested too deep: it has no meaning here, and whatever walks it later would have to beware."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [each for items in inner for each in items if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")
