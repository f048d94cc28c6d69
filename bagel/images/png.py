"""Parse a PNG's chunks without decoding it: keep those that decoding needs, and check that they arrived intact."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from bagel.images.colour import MAX_PROFILE_BYTES

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NO_PIXELS = b"\0\0\0\0IDAT5\xaf\x06\x1e"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_NEEDED = frozenset([b"tRNS"])  # beside the chunks whose names mark them as critical
_MAX_METADATA_BYTES = 2**20
# Two text chunks give an orientation: an uncompressed XMP packet, and the EXIF block as ImageMagick writes it.
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0"


@dataclass
class Png:
    """The part of a PNG to decode: the file without needless metadata, and its colour profile if it has one."""

    data: bytes
    profile: bytes | None = None


def read_png(data: bytes, *, pixels: bool = True) -> Png:
    """Walk through a PNG's chunks; ValueError if a needed one is damaged. Damaged metadata is left out.

    pixels: whether the caller wants the pixels too, not the header alone.
    """
    kept, turning, profile, view = [memoryview(SIGNATURE)], list[memoryview](), None, memoryview(data)
    for kind, start, end in _chunks(data):
        if kind == b"IEND":
            break
        body = view[start + 8 : end - 4]
        if kind[0] & 32 == 0 or kind in _NEEDED:
            # The decoder judges a chunk that the file's end cuts off: it knows whether pixels are missing.
            if end <= len(data) and not _is_intact(view, start, end):
                raise ValueError(f"its chunk {kind.decode('latin-1')} has a wrong checksum")
            if kind != b"IDAT" or pixels:
                kept.append(view[start:end])
        elif end <= len(data) and kind == b"iCCP":
            profile = profile or _profile(bytes(body))
        elif end <= len(data) and _turns(kind, body) and _is_intact(view, start, end):
            turning.append(view[start:end])
    # The orientation moves in front of the pixels, wherever it stood: the size must be known before any is decoded.
    return Png(b"".join([*kept[:2], *turning, *kept[2:], *([] if pixels else [_NO_PIXELS]), _END]), profile)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each chunk, which is a length, a kind, a body and a checksum."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if not kind.isalpha():
            raise ValueError(f"it has a chunk {kind!r}, which no PNG has")
        yield kind, at, at + 12 + length
        at += 12 + length


def _is_intact(view: memoryview, start: int, end: int) -> bool:
    return zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])


def _turns(kind: bytes, body: memoryview) -> bool:
    """Whether a chunk may give the picture's orientation, and is short enough to be read for that."""
    if len(body) > _MAX_METADATA_BYTES:
        return False
    if kind == b"zTXt":
        head = len(_RAW_EXIF)
        return bytes(body[:head]) == _RAW_EXIF and _inflated(bytes(body[head + 1 :]), _MAX_METADATA_BYTES) is not None
    begins = {b"eXIf": b"", b"iTXt": _XMP, b"tEXt": _RAW_EXIF}.get(kind)
    return begins is not None and bytes(body[: len(begins)]) == begins


def _profile(body: bytes) -> bytes | None:
    """The colour profile of an iCCP chunk: name, NUL, method, zlib data; None if it is unreadable or too large."""
    name, found, rest = body.partition(b"\0")
    return _inflated(rest[1:], MAX_PROFILE_BYTES) if found and rest[:1] == b"\0" and len(name) <= 79 else None


def _inflated(data: bytes, limit: int) -> bytes | None:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, limit)
    except zlib.error:
        return None
    return text if inflater.eof else None
