"""Put a picture's settings into its file, and read them: text chunks of a PNG, the EXIF comment of a JPEG or WebP.

The pixels are neither decoded nor encoded: a chunk, or a segment, is inserted.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin

from bagel.errors import InvalidImage
from bagel.images.png import SIGNATURE
from bagel.images.reading import StrPath, check_file, check_size, reason, shown

LONGEST = 5000
"""Characters of one text in a JPEG or WebP: all EXIF of a JPEG must fit into 64 KiB. A PNG has no such limit."""
_IHDR_END = len(SIGNATURE) + 25
_EXIF_IFD, _USER_COMMENT, _UTF16 = 0x8769, 0x9286, b"UNICODE\0"
_APP0, _APP1, _EXIF = b"\xff\xe0", b"\xff\xe1", b"Exif\0\0"
_VP8, _VP8X_HAS_EXIF = b"VP8 ", 0x08


def embed(data: bytes, settings: Mapping[str, str]) -> bytes:
    """The same picture file with settings in its metadata; data: as `OutputFormat.encode` makes it."""
    if data.startswith(SIGNATURE):
        return b"".join((data[:_IHDR_END], _png_chunks(png_texts(settings)), data[_IHDR_END:]))
    exif = _exif(settings)
    if data.startswith(b"RIFF"):
        return _webp(data, exif)
    at = 4 + int.from_bytes(data[4:6]) if data[2:4] == _APP0 else 2  # behind JFIF's own segment, which comes first
    segment = _EXIF + exif
    return b"".join((data[:at], _APP1, struct.pack(">H", len(segment) + 2), segment, data[at:]))


def png_texts(settings: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """The settings as a PNG's text chunks."""
    texts = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        # A prompt that was not UTF-8 has lone surrogates; they must not cost the user a finished picture.
        texts.add_text(name, _printable(value))
    return texts


def read_settings(source: StrPath | bytes) -> dict[str, str]:
    """The settings in a picture, by its path or as its bytes; empty if it has none. Raises InvalidImage."""
    name = "the picture" if isinstance(source, bytes) else shown(source)
    if not isinstance(source, bytes):
        check_file(source)
    file = BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            check_size(image.size, name)
            if isinstance(image, PngImagePlugin.PngImageFile):
                return {str(key): str(value) for key, value in image.text.items()}
            return _comment(image)
    except InvalidImage:
        raise
    except Exception as error:  # as in reading.py: Pillow raises almost any class
        raise InvalidImage(
            "image", f"{name} is not a readable PNG, JPEG or WebP ({reason(error)}); give a picture made here"
        ) from error


def _png_chunks(texts: PngImagePlugin.PngInfo) -> bytes:
    return b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body, *_ in texts.chunks
    )


def _exif(settings: Mapping[str, str]) -> bytes:
    """An EXIF block, without its prefix, whose comment is the settings as JSON."""
    short = {name: _cut(_printable(value)) for name, value in settings.items()}
    comment = json.dumps(short, ensure_ascii=False).encode("utf-16-be")
    exif = Image.Exif()
    exif[_EXIF_IFD] = {_USER_COMMENT: _UTF16 + comment}
    return exif.tobytes().removeprefix(_EXIF)


def _webp(data: bytes, exif: bytes) -> bytes:
    """A lossy WebP in the extended format, which alone has metadata."""
    kind, frame = data[12:16], data[20:30]
    if kind != _VP8:
        raise ValueError(f"the WebP begins with {kind!r}; only a plain lossy one was expected")
    width, height = (each & 0x3FFF for each in struct.unpack_from("<HH", frame, 6))
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    head = _riff_chunk(b"VP8X", struct.pack("<I", _VP8X_HAS_EXIF) + size)
    body = b"".join((b"WEBP", head, data[12:], _riff_chunk(b"EXIF", exif)))
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _comment(image: Image.Image) -> dict[str, str]:
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if not (isinstance(comment, bytes) and comment.startswith(_UTF16)):
        return {}
    try:
        found = json.loads(comment.removeprefix(_UTF16).decode("utf-16-be"))
    except ValueError:  # the comment of another program
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _printable(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
