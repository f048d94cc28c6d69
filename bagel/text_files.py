"""Decode text files as editors write them: UTF-8, unless a byte-order mark at the start names another encoding."""

from __future__ import annotations

MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32-le"),  # first, since it begins with UTF-16's mark
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
    (b"\xef\xbb\xbf", "utf-8"),
)
"""Byte-order marks, and the encodings that they stand for."""


def mark_of(data: bytes) -> tuple[bytes, str]:
    """The mark at the start of the bytes, and its encoding; without a mark, UTF-8."""
    return next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))


def decode_marked(data: bytes, errors: str = "strict") -> str:
    """The text without its mark; UnicodeDecodeError as bytes.decode raises it."""
    mark, encoding = mark_of(data)
    return data[len(mark) :].decode(encoding, errors)
