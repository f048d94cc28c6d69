"""How much there is in a message of protobuf, before it is read: an empty part is two bytes sent and some 20 held."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

MAX_FIELDS: Mapping[str, int] = {"bagel.v1.GenerateRequest": 1000}
"""Fields, those of messages inside included, that what callers send may have: a prompt of 64 parts has some 400."""
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_SIZES = {_I64: 8, _I32: 4}


def check_fields(data: bytes, kind: Descriptor, limit: int) -> None:
    """Raise DecodeError for a message of more fields than the limit; a value of a list counts as one.

    It reads no further than the limit. What is malformed is left to protobuf to refuse.
    """
    _count(memoryview(data), kind, limit, limit)


def _count(data: memoryview, kind: Descriptor, left: int, limit: int) -> int:
    """The fields that are left of the limit after those of this message."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire, field = tag & 7, kind.fields_by_number.get(tag >> 3)
        left -= 1
        if wire == _LEN:
            length, at = _read_varint(data, at)
            inside, at = data[at : at + length], at + length
            if field is not None and field.message_type is not None:
                left = _count(inside, field.message_type, left, limit)
            elif field is not None and field.is_repeated and field.type != FieldDescriptor.TYPE_BYTES:
                left -= length // 5  # packed numbers have one to five bytes here
        elif wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire in _SIZES:
            at += _SIZES[wire]
        else:
            return left  # a group, or no wire type: protobuf decides
        if left < 0:
            raise DecodeError(f"it has more than {limit} fields, lists and what is inside included")
    return left


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends; of a broken one what there is."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, at


def varint(value: int) -> bytes:
    """A whole number as protobuf writes it: seven bits a byte, the lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
