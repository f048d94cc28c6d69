"""Read images in a bounded number of worker processes, each image within a time limit. No torch here.

Pillow is quick with ordinary files but can spend minutes on a hostile one. The pool kills a worker whose time is up or
whose caller has left, and the next image gets a new one.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from PIL import Image

from bagel.errors import Busy, ConfigError, InvalidImage
from bagel.images.colour import digest_of_pixels
from bagel.images.recent import RecentImages, file_digest
from bagel.images.transforms import ImageTransform, PreparedImage, ResizedImage
from bagel.images.worker_process import PARTS, Part, WorkerDied, WorkerProcess
from bagel.telemetry.logs import Log

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
_ATTEMPTS = 2
Values = tuple[int, int, int]
Made = tuple[Image.Image | None, bytes | None]
"""An image for one of the encoders, and its digest."""
NOTHING: Made = (None, None)
OnVae = Callable[[Image.Image], None]
MOST_FILES = 4096
"""Files that are known by their digests, the least recently noted goes first."""

log = Log("bagel.images")


class ImagePool:
    """At most `workers` processes that read images: one from `start` on, more when they are needed.

    timeout_s: time for one image, then InvalidImage; wait_s: time to wait for a free worker, then Busy. All calls come
    from one event loop; cancelling a call kills its worker.
    """

    def __init__(self, workers: int, timeout_s: float = 20.0, wait_s: float = 5.0) -> None:
        if workers < 1:
            raise ConfigError(f"image_workers is {workers}; it must be at least 1", "image_workers")
        if not 0 < timeout_s < math.inf:
            raise ConfigError(
                f"image_timeout is {timeout_s:g}; it must be a number of seconds above 0", "image_timeout"
            )
        self._timeout_s, self._wait_s, self._count = timeout_s, wait_s, workers
        self._places = asyncio.Semaphore(workers)
        self._idle: list[WorkerProcess] = []
        self._closed = False
        self._recent = RecentImages()
        self._sizes: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._read_lately: OrderedDict[Hashable, None] = OrderedDict()

    async def start(self) -> None:
        """Start a process, so that the first image need not wait for it. BagelError where none can be started."""
        self._idle.append(await WorkerProcess.start())

    async def size(self, data: bytes) -> tuple[int, int]:
        """The upright (width, height) of an image file, from its headers; no pixel is decoded.

        That of a file that came lately is known: its digest takes a fraction of its way to a worker.
        """
        key = await file_digest(data)
        if key not in self._sizes:
            answer = await self._read({"work": "size"}, data)
            width, height = answer["size"]
            _note(self._sizes, key, (width, height))
        self._sizes.move_to_end(key)
        return self._sizes[key]

    async def resized(
        self,
        data: bytes,
        vae_transform: ImageTransform,
        vit_transform: ImageTransform,
        *,
        for_generation: bool,
        for_understanding: bool,
        on_vae: OnVae | None = None,
    ) -> ResizedImage:
        """Decode and resize an image file as `prepare` does. One that was read lately is not read again.

        on_vae: called with the image that the VAE takes as soon as it is there, while it is still hashed, and resized
        for the ViT; on a thread of its own, perhaps twice. Not for a file that came lately, even if it is read again:
        what is made of it may be known by its digest.
        """
        transforms = _values(vae_transform), _values(vit_transform)
        key = await file_digest(data), transforms, for_generation, for_understanding
        # The contexts of one request want the same image at once.
        async with self._recent.turn(key, self._wait_s):
            if (image := self._recent.get(key)) is None:
                task = {
                    "work": "resize",
                    "vae_transform": transforms[0],
                    "vit_transform": transforms[1],
                    "for_generation": for_generation,
                    "for_understanding": for_understanding,
                }
                image = await self._resized(task, data, None if key in self._read_lately else on_vae)
                self._recent.put(key, image)
                _note(self._read_lately, key, None)
            return image

    async def _resized(self, task: dict[str, Any], data: bytes, on_vae: OnVae | None) -> ResizedImage:
        making: dict[str, asyncio.Task[Made]] = {}

        async def make(part: Part) -> Made:
            return await asyncio.to_thread(_image, part, on_vae if part.name == "vae" else None)

        def on_part(part: Part) -> None:
            making[part.name] = asyncio.create_task(make(part))

        try:
            facts = await self._read(task, data, on_part)
            vae, vit = [await making[name] if name in making else NOTHING for name in PARTS]
        finally:
            for each in making.values():
                each.cancel()
        digests = vae[1], vit[1]
        return ResizedImage(tuple(facts["size"]), PreparedImage(tuple(facts["resized"]), vae[0], vit[0], digests))

    async def close(self) -> None:
        """Kill the idle workers; a worker that is reading is killed when its call ends."""
        self._closed = True
        while self._idle:
            await self._idle.pop().kill()

    async def _read(
        self, task: dict[str, Any], data: bytes, on_part: Callable[[Part], None] = lambda part: None
    ) -> dict[str, Any]:
        """Give a task to a worker; its last answer. on_part: as of `WorkerProcess.work`, perhaps twice for the same.

        Raises InvalidImage with its reason if it refuses.
        """
        if not data:
            raise InvalidImage("image", "the image is empty (0 bytes); send the bytes of an image file")
        for attempt in range(_ATTEMPTS):
            try:
                async with self._worker() as worker:
                    answer = await self._answer(worker, {**task, "seconds": self._timeout_s}, data, on_part)
                break
            except WorkerDied:  # one retry: the host may have killed it for memory, so the image need not be the cause
                log.warning("a process that reads images has died", attempt=attempt + 1)
        else:
            raise InvalidImage("image", "the image ends the process that reads it; save it anew as a PNG or JPEG")
        if "refused" in answer:
            raise InvalidImage("image", str(answer["refused"]))
        return answer

    async def _answer(
        self, worker: WorkerProcess, task: dict[str, Any], data: bytes, on_part: Callable[[Part], None]
    ) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await worker.work(task, data, on_part)
        except TimeoutError:
            log.warning("an image took too long", seconds=self._timeout_s, bytes=len(data))
            raise InvalidImage(
                "image",
                f"the image takes more than {self._timeout_s:g} s to read, the service's image_timeout; "
                "save it anew as a plain PNG or JPEG, or scale it down",
            ) from None

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[WorkerProcess]:
        """A worker for one image, killed unless the block ends without an error; Busy if none is free in time."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise Busy(
                f"all {self._count} processes that read images are busy; try again later, or raise the service's "
                "image_workers"
            ) from None
        worker = None
        try:
            worker = self._take() or await WorkerProcess.start()
            yield worker
            if not self._closed:
                self._idle.append(worker)
                worker = None
        finally:
            self._places.release()
            if worker is not None:  # shielded: a cancelled call must not leave its worker running
                await asyncio.shield(worker.kill())

    def _take(self) -> WorkerProcess | None:
        """An idle worker that is still alive; None if there is none."""
        while self._idle:
            if (worker := self._idle.pop()).alive:
                return worker
            worker.forget()
        return None


def _note(files: OrderedDict[K, T], key: K, what: T) -> None:
    """Keep what is known of a file."""
    files[key] = what
    files.move_to_end(key)
    if len(files) > MOST_FILES:
        files.popitem(last=False)


def _image(part: Part, on_made: OnVae | None) -> Made:
    """A part's image and its digest. on_made: called with the image before it is hashed.

    The digest is made here and not by a worker: by it an image finds the K/V of another that has the same, and a worker
    that a hostile file has taken over could name any.
    """
    image = Image.frombytes("RGB", part.size, part.pixels)
    if on_made is not None:
        on_made(image)
    return image, digest_of_pixels(part.size, part.pixels)


def _values(transform: ImageTransform) -> Values:
    return transform.max_size, transform.min_size, transform.stride
