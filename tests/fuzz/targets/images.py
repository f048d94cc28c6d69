"""Image files of callers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO

from PIL import Image

from bagel.errors import InvalidImage
from bagel.images import FORMATS, image_size, load_image
from tests.fuzz.target import Target

MOST_PIXELS = 2**18
"""Larger ones are sized but not decoded, so that there are many runs a second."""


def check(data: bytes) -> None:
    width, height = image_size(data)
    if width * height > MOST_PIXELS:
        return
    image = load_image(data)
    assert (image.mode, image.info) == ("RGB", {})
    alone: tuple[int, ...] = ()
    assert image.size == (width, height), f"its headers say {width}x{height}, its pixels are {image.size}"
    # Pillow alone refuses what is dropped here unread, such as damaged metadata.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(data), formats=FORMATS) as plain:
            alone = plain.size
    assert sorted(alone or image.size) == sorted(image.size), "Pillow alone reads another size"


def seeds() -> Iterable[bytes]:
    pictures = {
        "RGB": ("PNG", "JPEG", "WEBP", "BMP", "TIFF"),
        "P": ("PNG", "GIF", "TIFF", "BMP"),
        "LA": ("PNG", "TIFF"),
        "RGBA": ("PNG", "WEBP"),
        "CMYK": ("JPEG", "TIFF"),
        "I;16": ("PNG", "TIFF"),
        "1": ("PNG", "BMP", "TIFF"),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, kinds in pictures.items():
        for kind in kinds:
            stream = BytesIO()
            Image.new(mode, (5, 3)).save(stream, kind, **({"exif": exif} if mode == "RGB" and kind != "BMP" else {}))
            yield stream.getvalue()
    progressive = BytesIO()
    Image.linear_gradient("L").resize((16, 9)).save(progressive, "JPEG", progressive=True)
    yield progressive.getvalue()


CHUNKS = b"IHDR IDAT IEND iCCP eXIf tRNS PLTE acTL fdAT GIF89a RIFF WEBPVP8 VP8L VP8X ANIM BM"
MARKERS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8",
    b"\xff\xd9",
    b"\xff\xda",
    b"\xff\xc2",
    b"\xff\xe1",
    b"Exif\0\0",
    b"ICC_PROFILE\0",
)
TARGET = Target(check, (InvalidImage,), seeds, words=(*CHUNKS.split(), *MARKERS, b"II*\0", b"MM\0*"))
