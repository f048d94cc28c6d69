"""Images that were read a short while ago, so that a file that comes again is not decoded again. No torch here."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager, suppress

from bagel.images.transforms import PreparedImage, ResizedImage

MAX_BYTES = 64 << 20
"""Of pixels: six images of the largest size that the public model reads."""
IN_THE_LOOP_BYTES = 256 << 10
"""A file up to this size is hashed in the event loop, in a third of a millisecond."""
PIXEL_BYTES = 4
"""Of an RGB pixel, as Pillow keeps it."""


class RecentImages:
    """Bounded in bytes; the least recently used goes first. All calls come from one event loop."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._nbytes = max_bytes, 0
        self._images: OrderedDict[Hashable, ResizedImage] = OrderedDict()
        self._reading: dict[Hashable, asyncio.Lock] = {}

    def get(self, key: Hashable) -> ResizedImage | None:
        """An image that was kept."""
        if (image := self._images.get(key)) is not None:
            self._images.move_to_end(key)
        return image

    def put(self, key: Hashable, image: ResizedImage) -> None:
        """Keep an image."""
        if key in self._images or (size := _nbytes(image.prepared)) > self._max_bytes:
            return
        self._images[key] = image
        self._nbytes += size
        while self._nbytes > self._max_bytes:
            _, dropped = self._images.popitem(last=False)
            self._nbytes -= _nbytes(dropped.prepared)

    @asynccontextmanager
    async def turn(self, key: Hashable, limit_s: float) -> AsyncIterator[None]:
        """Around reading an image: whoever wants the same one waits, at most so long, and finds it kept afterwards."""
        lock = self._reading.setdefault(key, asyncio.Lock())
        taken = False
        try:
            # After that time it is read beside the other, as if it were another image.
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    taken = await lock.acquire()
            yield
        finally:
            if taken:
                lock.release()
            if not lock.locked():
                self._reading.pop(key, None)


async def file_digest(data: bytes) -> bytes:
    """Tells files apart, hostile ones too."""
    if len(data) <= IN_THE_LOOP_BYTES:
        return hashlib.sha256(data).digest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).digest())


def _nbytes(image: PreparedImage) -> int:
    return sum(each.width * each.height * PIXEL_BYTES for each in (image.vae, image.vit) if each is not None)
