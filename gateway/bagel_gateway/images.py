"""The input images of requests. A gateway reads their headers alone; their files go on as they came."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bagel.errors import InvalidImage
from bagel.images import UnreadImage
from bagel.images.pool import ImagePool
from bagel.prompts import ImagePart, Prompt
from bagel.v1 import common_pb2


@dataclass(frozen=True, eq=False)
class ImageFile(UnreadImage):
    """An image as its user sent it; size is (0, 0) until its header is read.

    The message keeps the only copy of the file for the whole request: each look at its `data` makes another one.
    """

    message: common_pb2.ImagePart


class InputImages:
    """Looks at images. max_images and max_pixels: of one request's images together."""

    def __init__(self, pool: ImagePool, max_images: int, max_pixels: int) -> None:
        self._pool, self.max_images, self._max_pixels = pool, max_images, max_pixels

    async def start(self) -> None:
        """Start what reads images. BagelError where it cannot be started."""
        await self._pool.start()

    async def measured(self, prompt: Prompt) -> Prompt:
        """The prompt with its images' sizes, by their headers; InvalidImage for too many, or too large ones."""
        count = sum(isinstance(part, ImagePart) for part in prompt)
        if count > self.max_images:
            raise InvalidImage("image", f"there are {count} images; one request may have {self.max_images}")
        pixels = 0
        measured = list(prompt)
        for number, part in enumerate(prompt):
            if not isinstance(part, ImagePart):
                continue
            file = file_of(part)
            width, height = await self._pool.size(file.message.data)
            measured[number] = replace(part, image=replace(file, size=(width, height)))
            pixels += width * height
            # Checked after each image, so that the rest of too many pixels is not looked at.
            if pixels > self._max_pixels:
                raise InvalidImage(
                    "image",
                    f"the images of the request have {pixels} pixels or more in all; scale them down to at most "
                    f"{self._max_pixels} together",
                )
        return tuple(measured)

    async def close(self) -> None:
        """Look at no more."""
        await self._pool.close()


def file_of(part: ImagePart) -> ImageFile:
    """The file of an image part; a gateway has no other images."""
    assert isinstance(part.image, ImageFile)
    return part.image
