"""The input images of requests, as far as a gateway looks at them: their sizes. Their files go on as they came."""

from __future__ import annotations

from collections.abc import Sequence

from bagel.errors import InvalidImage
from bagel.images import UnreadImage
from bagel.images.pool import ImagePool
from bagel.v1 import common_pb2

MAX_IMAGES = 4
"""More at the model's full size have more tokens than it has positions for."""
MOST_IMAGES = 8
"""What the setting may be: as many files as a form may have."""
MAX_IMAGE_PIXELS = 4 * 64_000_000


class InputImages:
    """Looks at images. max_images and max_pixels: of one request's images together."""

    def __init__(self, pool: ImagePool, max_images: int = MAX_IMAGES, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self._pool, self.max_images, self._max_pixels = pool, max_images, max_pixels

    async def sizes(self, parts: Sequence[common_pb2.Part]) -> list[UnreadImage]:
        """The sizes of a prompt's images in order, by their headers; InvalidImage for too many, or too large ones."""
        files = [part.image for part in parts if part.HasField("image")]
        if len(files) > self.max_images:
            raise InvalidImage("image", f"there are {len(files)} images; one request may have {self.max_images}")
        sizes: list[UnreadImage] = []
        pixels = 0
        for file in files:
            width, height = await self._pool.size(file.data)
            sizes.append(UnreadImage((width, height)))
            pixels += width * height
            if pixels > self._max_pixels:
                raise InvalidImage(
                    "image",
                    f"the images of the request have {pixels} pixels or more in all; scale them down to at most "
                    f"{self._max_pixels} together",
                )
        return sizes

    async def close(self) -> None:
        """Look at no more."""
        await self._pool.close()
