"""Write a picture as a PNG, in a third of the time that Pillow takes on one core, and on several cores at once.

Each row is what changes from the row above (PNG's filter "up"), of which zlib looks for runs alone. Pillow tries all
five filters on each row. https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL.Image import Image

from bagel.images.png import SIGNATURE

_UP = 2
_BITS, _RGB = 8, 2
_LEVEL = 1
_HEADER = b"\x78\x01"
"""A zlib stream's first bytes: deflate with a window of 32 KiB, compressed fast (RFC 1950)."""
_STRIP = 1 << 19
"""Bytes that are compressed at a time. Not by the number of cores, so that every machine writes the same file."""
_THREADS = 8


def write_png(image: Image) -> bytes:
    """The file of a picture whose mode is RGB."""
    width, height = image.size
    pixels = np.asarray(image).reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])  # modulo 256, as the filter is defined
    header = struct.pack(">2I5B", width, height, _BITS, _RGB, 0, 0, 0)
    body = b"".join(_zlib(rows.data.cast("B")))
    return b"".join((SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b"")))


def _zlib(data: memoryview) -> Iterator[bytes]:
    """The pieces of a zlib stream. zlib lets other threads run while it compresses."""
    begins = range(0, len(data), _STRIP)
    with ThreadPoolExecutor(min(_THREADS, len(begins))) as threads:
        strips = threads.map(lambda begin: _deflated(data[begin : begin + _STRIP], begin == begins[-1]), begins)
        yield _HEADER
        yield from strips
    yield struct.pack(">I", zlib.adler32(data))


def _deflated(data: memoryview, last: bool) -> bytes:
    """A strip of a deflate stream, which ends at a whole byte for the next one to follow."""
    # Filtered rows have few matches: a search for them takes longer, and makes the file larger.
    deflate = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS, strategy=zlib.Z_RLE)
    return deflate.compress(data) + deflate.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)))
