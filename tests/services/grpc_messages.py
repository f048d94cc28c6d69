"""Messages of bagel.v1 as nobody means them: every field set or not, values at and past every limit, unknown fields."""

from __future__ import annotations

from io import BytesIO
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from PIL import Image

M = TypeVar("M", bound=Message)

UNKNOWN_FIELDS = (b"", b"\xf8\x7f\x2a", b"\xfa\x7f\x03abc", b"\xfd\x7f\x00\x00\x80\x3f")
"""Field 2047, of a newer release, as a number, bytes and a float."""
FLOATS = st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")])
UNSIGNED = st.sampled_from([0, 1, 2, 3, 8, 16, 64, 101, 2**31, 2**32 - 1])
LONG = st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
ENUMS = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 4, 5, 99, 2**31 - 1])
TEXTS = st.sampled_from(["", " ", "a red cube", "a red cube", "<|im_end|>", "\x00", "日本", "word " * 300]) | st.text(
    max_size=12
)


def image_file(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    """A plain picture's file."""
    stream = BytesIO()
    Image.new("RGB", (width, height), "navy").save(stream, kind)
    return stream.getvalue()


def _huge() -> bytes:
    """A PNG that says in its header that it has 60,000 pixels a side."""
    whole = bytearray(image_file())
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(whole)


FILES = st.sampled_from([image_file(), image_file(1, 1, "GIF"), image_file()[:60], _huge(), b""]) | st.binary(
    max_size=40
)
DIGESTS = st.sampled_from([b"", b"?" * 16, b"!" * 16, b"short"]) | st.binary(min_size=16, max_size=16)
_KINDS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: FLOATS,
    FieldDescriptor.TYPE_UINT32: UNSIGNED,
    FieldDescriptor.TYPE_UINT64: LONG,
    FieldDescriptor.TYPE_ENUM: ENUMS,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: FILES,
}


def messages(kind: type[M], named: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[M]:
    """Messages of a type, each field of each level set or not. named: values of fields of that name, on every level."""
    return st.builds(_with_unknown, _messages(kind, named), st.sampled_from(UNKNOWN_FIELDS))


def near(right: st.SearchStrategy[M], kind: type[M], named: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[M]:
    """What is nearly right: a right message, with one field changed, or with what another message has set over it."""
    return st.builds(_merged, right, st.one_of(_messages(kind, named), *_one_field(kind, named)))


def _messages(kind: type[Any], named: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    fields = {field.name: _values(field, named) for field in kind.DESCRIPTOR.fields}
    return st.builds(lambda given: kind(**given), st.fixed_dictionaries({}, optional=fields))


def _one_field(kind: type[Any], named: dict[str, st.SearchStrategy[Any]]) -> list[st.SearchStrategy[Any]]:
    """Messages with one field set, a strategy for each field of each level: all of them are as likely."""
    choices: list[st.SearchStrategy[Any]] = []
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is None or field.name in named:
            choices.append(st.builds(kind, **{field.name: _values(field, named)}))
            continue
        for inner in _one_field(GetMessageClass(field.message_type), named):
            one = st.lists(inner, min_size=1, max_size=1) if field.is_repeated else inner
            choices.append(st.builds(kind, **{field.name: one}))
    return choices


def _values(field: FieldDescriptor, named: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    one = named.get(field.name)
    if one is None:
        inner = field.message_type
        one = _KINDS[field.type] if inner is None else _messages(GetMessageClass(inner), named)
    return st.lists(one, max_size=3) if field.is_repeated else one


def _with_unknown(message: M, more: bytes) -> M:
    message.MergeFromString(more)
    return message


def _merged(base: M, other: M) -> M:
    made = type(base)()
    made.CopyFrom(base)
    made.MergeFrom(other)
    return made
