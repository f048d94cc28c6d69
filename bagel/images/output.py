"""How a picture is given out: the format of its file, how much that loses, its previews. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL.Image import Image

from bagel.errors import InvalidRequest

OUTPUT_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of them."""
QUALITY = 95
"""Of a JPEG or WebP where none is asked for."""
MAX_PREVIEWS = 3


@dataclass(frozen=True)
class OutputFormat:
    """How a picture is given out; raises InvalidRequest for what there is not. bagel.effect says what goes together.

    format: one of OUTPUT_FORMATS, in any case; compression: quality of a JPEG or WebP, from 0 to 100; None: QUALITY.
    previews: how many of the picture under way.
    """

    format: str = "PNG"
    compression: int | None = None
    previews: int = 0

    def __post_init__(self) -> None:
        name = str(self.format).upper()
        if name not in OUTPUT_FORMATS:
            wanted = ", ".join(OUTPUT_FORMATS)
            raise InvalidRequest("output_format", f"output_format is {self.format!r}; it must be one of {wanted}")
        object.__setattr__(self, "format", name)
        if self.compression is not None:
            _check("output_compression", self.compression, 100)
        _check("partial_images", self.previews, MAX_PREVIEWS)

    def settings(self) -> dict[str, Any]:
        """The settings that a request has for this, by their names; None where one is not given."""
        return {
            "output_format": self.format,
            "output_compression": self.compression,
            "partial_images": self.previews,
        }

    def encode(self, image: Image) -> bytes:
        """A picture as a file."""
        stream = BytesIO()
        quality = QUALITY if self.compression is None else self.compression
        options: dict[str, Any] = {"compress_level": 1} if self.format == "PNG" else {"quality": quality}
        image.save(stream, self.format, **options)
        return stream.getvalue()


def _check(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InvalidRequest(name, f"{name} is {value!r:.80}; it must be a whole number from 0 to {most}")
