"""Read images in a bounded number of worker processes, each image within a time limit. No torch here.

Pillow is quick with ordinary files but can spend minutes on a hostile one. The pool kills a worker whose time is up or
whose caller has left, and the next image gets a new one.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bagel.errors import BagelError, Busy, ConfigError, InvalidImage
from bagel.images import frames, pixels_file
from bagel.images.colour import digest_of_pixels
from bagel.images.reading import MAX_INPUT_PIXELS
from bagel.images.recent import RecentImages, file_digest
from bagel.images.transforms import ImageTransform, PreparedImage, ResizedImage
from bagel.telemetry.logs import Log

_ATTEMPTS = 2
Values = tuple[int, int, int]
Size = tuple[int, int]
_BUFFER_BYTES = 2**20
MOST_SIZES = 4096
"""Files whose size is kept, the least recently asked for goes first."""

log = Log("bagel.images")


class _Died(Exception):
    """The worker ended while it read an image, or does not do what a worker does."""


@dataclass(eq=False)
class _Worker:
    """A process that reads images. pixels: the descriptor of the file that it writes them to."""

    process: asyncio.subprocess.Process
    pixels: int


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
        self._idle: list[_Worker] = []
        self._closed = False
        self._recent = RecentImages()
        self._sizes: OrderedDict[bytes, tuple[int, int]] = OrderedDict()

    async def start(self) -> None:
        """Start a process, so that the first image need not wait for it. BagelError where none can be started."""
        self._idle.append(await _start())

    async def size(self, data: bytes) -> tuple[int, int]:
        """The upright (width, height) of an image file, from its headers; no pixel is decoded.

        That of a file that came lately is known: its digest takes a fraction of its way to a worker.
        """
        key = await file_digest(data)
        if key not in self._sizes:
            answer, _ = await self._read({"work": "size"}, data)
            width, height = answer["size"]
            self._sizes[key] = (width, height)
            if len(self._sizes) > MOST_SIZES:
                self._sizes.popitem(last=False)
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
    ) -> ResizedImage:
        """Decode and resize an image file as `prepare` does. One that was read lately is not read again."""
        transforms = _values(vae_transform), _values(vit_transform)
        key = await file_digest(data), transforms, for_generation, for_understanding
        # The contexts of one request want the same image at once.
        async with self._recent.turn(key, self._wait_s):
            if (image := self._recent.get(key)) is None:
                image = await self._resized(data, transforms, for_generation, for_understanding)
                self._recent.put(key, image)
            return image

    async def _resized(
        self, data: bytes, transforms: tuple[Values, Values], for_generation: bool, for_understanding: bool
    ) -> ResizedImage:
        task = {
            "work": "resize",
            "vae_transform": transforms[0],
            "vit_transform": transforms[1],
            "for_generation": for_generation,
            "for_understanding": for_understanding,
        }
        answer, pixels = await self._read(task, data)
        vae, vit = _sizes(answer)
        split = _nbytes(vae)  # the pixels for the ViT follow those for the VAE
        parts = ((vae, memoryview(pixels)[:split]), (vit, memoryview(pixels)[split:]))
        (vae_image, vae_digest), (vit_image, vit_digest) = await asyncio.gather(
            *(asyncio.to_thread(_image, size, part) for size, part in parts)
        )
        prepared = PreparedImage(tuple(answer["resized"]), vae_image, vit_image, (vae_digest, vit_digest))
        return ResizedImage(tuple(answer["size"]), prepared)

    async def close(self) -> None:
        """Kill the idle workers; a worker that is reading is killed when its call ends."""
        self._closed = True
        while self._idle:
            await _kill(self._idle.pop())

    async def _read(self, task: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Give a task to a worker; its answer and the pixels. Raises InvalidImage with its reason if it refuses."""
        if not data:
            raise InvalidImage("image", "the image is empty (0 bytes); send the bytes of an image file")
        for attempt in range(_ATTEMPTS):
            try:
                async with self._worker() as worker:
                    answer, pixels = await self._answer(worker, {**task, "seconds": self._timeout_s}, data)
                break
            except _Died:  # one retry: the host may have killed it for memory, so the image need not be the cause
                log.warning("a process that reads images has died", attempt=attempt + 1)
        else:
            raise InvalidImage("image", "the image ends the process that reads it; save it anew as a PNG or JPEG")
        if "refused" in answer:
            raise InvalidImage("image", str(answer["refused"]))
        return answer, pixels

    async def _answer(self, worker: _Worker, task: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        stdin, stdout = worker.process.stdin, worker.process.stdout
        assert stdin is not None and stdout is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                await frames.send(stdin, task, data)
                answer = await frames.receive(stdout)
        except TimeoutError:
            log.warning("an image took too long", seconds=self._timeout_s, bytes=len(data))
            raise InvalidImage(
                "image",
                f"the image takes more than {self._timeout_s:g} s to read, the service's image_timeout; "
                "save it anew as a plain PNG or JPEG, or scale it down",
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _Died from None
        nbytes = sum(map(_nbytes, _sizes(answer)))
        pixels = pixels_file.read(worker.pixels, nbytes)
        if len(pixels) < nbytes:
            raise _Died
        return answer, pixels

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
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
            worker = self._take() or await _start()
            yield worker
            if not self._closed:
                self._idle.append(worker)
                worker = None
        finally:
            self._places.release()
            if worker is not None:  # shielded: a cancelled call must not leave its worker running
                await asyncio.shield(_kill(worker))

    def _take(self) -> _Worker | None:
        """An idle worker that is still alive; None if there is none."""
        while self._idle:
            if (worker := self._idle.pop()).process.returncode is None:
                return worker
            os.close(worker.pixels)
        return None


async def _start() -> _Worker:
    pixels = pixels_file.make()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bagel.images.worker",
            str(pixels),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_BUFFER_BYTES,
            pass_fds=(pixels,),
        )
    except BaseException as error:
        os.close(pixels)
        if isinstance(error, OSError):
            raise BagelError(f"no process that reads images can be started: {error.strerror}") from None
        raise
    return _Worker(process, pixels)


async def _kill(worker: _Worker) -> None:
    """Kill a worker and wait until it has ended."""
    os.close(worker.pixels)
    process = worker.process
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()
        with suppress(ConnectionError):
            await process.stdin.wait_closed()


def _sizes(answer: dict[str, Any]) -> tuple[Size | None, Size | None]:
    """The sizes that a worker says the images for the VAE and the ViT have; None for one that there is not."""
    vae, vit = (None if each is None else (each[0], each[1]) for each in (answer.get("vae"), answer.get("vit")))
    return vae, vit


def _nbytes(size: Size | None) -> int:
    """Of the pixels of an image. Raises _Died for more than any has."""
    if size is None:
        return 0
    if not 0 < size[0] * size[1] <= MAX_INPUT_PIXELS:
        raise _Died
    return 3 * size[0] * size[1]


def _image(size: Size | None, pixels: memoryview) -> tuple[Image.Image | None, bytes | None]:
    """An image and its digest.

    The digest is made here and not by a worker: by it an image finds the K/V of another that has the same, and a worker
    that a hostile file has taken over could name any.
    """
    return (None, None) if size is None else (Image.frombytes("RGB", size, pixels), digest_of_pixels(size, pixels))


def _values(transform: ImageTransform) -> Values:
    return transform.max_size, transform.min_size, transform.stride
