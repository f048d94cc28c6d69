"""Write a picture as a PNG, in a third of the time that Pillow takes.

Each row is what changes from the row above (PNG's filter "up"), of which zlib looks for runs alone. Pillow tries all
five filters on each row. https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL.Image import Image

from bagel.images.png import SIGNATURE

_UP = 2
_BITS, _RGB = 8, 2
_LEVEL = 1


def write_png(image: Image) -> bytes:
    """The file of a picture whose mode is RGB."""
    width, height = image.size
    pixels = np.asarray(image).reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])  # modulo 256, as the filter is defined
    header = struct.pack(">2I5B", width, height, _BITS, _RGB, 0, 0, 0)
    # Filtered rows have few matches: a search for them takes longer, and makes the file larger.
    deflate = zlib.compressobj(_LEVEL, strategy=zlib.Z_RLE)
    body = deflate.compress(rows.data) + deflate.flush()
    return b"".join((SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b"")))


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)))
