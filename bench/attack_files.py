"""Small files that cause much work: large pictures, JPEGs with many scans, JSON with many values."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

SIDE = 8000
"""Side of the large picture: 64 megapixels, 183 MiB when decoded."""


def large_png(side: int = SIDE) -> bytes:
    """A white picture in some 200 KiB."""
    row = b"\0" + b"\xff" * (3 * side)  # row by row, since Pillow would hold the decoded picture
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)


def scans_jpeg(side: int = 2800, scans: int = 1000) -> bytes:
    """A progressive JPEG that repeats its last scan many times."""
    stored = io.BytesIO()
    Image.new("L", (side, side), 128).save(stored, "JPEG", progressive=True)
    data = stored.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def many_values(nbytes: int) -> bytes:
    """A chat request with very many messages, all empty objects."""
    return b'{"model":"bagel-nano","messages":[' + b"{}," * (nbytes // 3) + b"{}]}"


def deep_json(nbytes: int) -> bytes:
    """A chat request of deeply nested lists."""
    return b'{"model":"bagel-nano","messages":' + b"[" * (nbytes // 2) + b"]" * (nbytes // 2) + b"}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
