"""The output of a picture: the format and quality of its file, and the number of previews. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL.Image import Image

from bagel.errors import InvalidRequest

OUTPUT_FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats, by Pillow's names."""
QUALITY = 95
"""Quality of a JPEG or WebP if the user gives none."""
MAX_PREVIEWS = 3


@dataclass(frozen=True)
class OutputFormat:
    """The output of a picture; raises InvalidRequest for an unknown value. bagel.effect checks how values combine.

    format: one of OUTPUT_FORMATS, in upper or lower case; compression: the quality of a JPEG or WebP, 0 to 100 (None:
    QUALITY); previews: the number of previews while the picture is drawn.
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
        """These values under the names that a request has for them; None where the user gave none."""
        return {
            "output_format": self.format,
            "output_compression": self.compression,
            "partial_images": self.previews,
        }

    def encode(self, image: Image) -> bytes:
        """Encode a picture, of mode RGB, as a file."""
        if self.format == "PNG":
            # Imported here, as a gateway has no NumPy.
            from bagel.images.png_writer import write_png

            return write_png(image)
        stream = BytesIO()
        image.save(stream, self.format, quality=QUALITY if self.compression is None else self.compression)
        return stream.getvalue()


def _check(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InvalidRequest(name, f"{name} is {value!r:.80}; it must be a whole number from 0 to {most}")
