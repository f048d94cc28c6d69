"""Pictures as the bytes of a file. No torch here."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL.Image import Image

QUALITY = 95
"""Of a JPEG or WebP where none is asked for."""


def encode_image(image: Image, name: str, quality: int | None = None) -> bytes:
    """A picture as a file of the format that Pillow calls `name`; quality: of a JPEG or WebP, from 0 to 100."""
    stream = BytesIO()
    options: dict[str, Any] = (
        {"compress_level": 1} if name == "PNG" else {"quality": QUALITY if quality is None else quality}
    )
    image.save(stream, name, **options)
    return stream.getvalue()
