"""The pool's end of one process that reads images (`bagel.images.worker`). No torch here."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bagel.errors import BagelError
from bagel.images import frames, pixels_file
from bagel.images.reading import MAX_INPUT_PIXELS

_BUFFER_BYTES = 2**20
PARTS = ("vae", "vit")
"""The images that a worker makes of one, in this order: for the VAE, and for the ViT."""

Size = tuple[int, int]


class WorkerDied(Exception):
    """The worker ended while it read an image, or does not do what a worker does."""


@dataclass(frozen=True)
class Part:
    """An image for one of the encoders as it comes: its name of PARTS, its size, and its RGB bytes row by row."""

    name: str
    size: Size
    pixels: bytes


@dataclass(eq=False)
class WorkerProcess:
    """A process that reads images. pixels: the descriptor of the file that it writes them to."""

    process: asyncio.subprocess.Process
    pixels: int

    @classmethod
    async def start(cls) -> WorkerProcess:
        """A new one; BagelError where none can be started."""
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
        return cls(process, pixels)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.returncode is None

    async def work(self, task: dict[str, Any], data: bytes, on_part: Callable[[Part], None]) -> dict[str, Any]:
        """Give it a task and a file; its last answer. on_part gets each image as it is made. Raises WorkerDied."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        wanted, at = list(PARTS), 0
        try:
            await frames.send(stdin, task, data)
            while "part" in (answer := await frames.receive(stdout)):
                wanted.remove(answer["part"])  # a ValueError for another, or the same again
                part = self._part(answer, at)
                at += len(part.pixels)
                on_part(part)
            pixels_file.trim(self.pixels)
        except (asyncio.IncompleteReadError, ConnectionError, KeyError, TypeError, ValueError):
            raise WorkerDied from None
        return answer

    def _part(self, answer: dict[str, Any], at: int) -> Part:
        """The image that an answer tells of, whose pixels begin there in the file."""
        width, height = answer["image"]
        # Before anything is allocated: a hostile file may have taken the worker over.
        if min(width, height) < 1 or width * height > MAX_INPUT_PIXELS:
            raise WorkerDied
        pixels = pixels_file.read(self.pixels, 3 * width * height, at)
        if len(pixels) < 3 * width * height:
            raise WorkerDied
        return Part(answer["part"], (width, height), pixels)

    async def kill(self) -> None:
        """Kill it and wait until it has ended."""
        self.forget()
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
            with suppress(ConnectionError):
                await self.process.stdin.wait_closed()

    def forget(self) -> None:
        """Give up what belongs to one that has ended."""
        os.close(self.pixels)
