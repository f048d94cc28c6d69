"""The VAE's thread: decodes and encodes pictures, finished or under way, while the steps of others go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.engine.clock import Moment, WindowClock, mark, seconds_between
from bagel.engine.decoding import decode_picture, help_decode_picture
from bagel.engine.events import Drawn, Event, Previewed
from bagel.engine.progress import Heartbeat
from bagel.engine.sampler import Drawing
from bagel.errors import BagelError, NotFinite
from bagel.images.output import OutputFormat
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedPicture:
    """A picture whose last step is launched: its latents, valid after the event `launched`."""

    id: int
    latents: Tensor
    grid: tuple[int, int]
    output: OutputFormat | None
    windows: WindowClock | None
    launched: torch.cuda.Event | None


@dataclass(frozen=True)
class EarlyPicture:
    """A preview to decode: the clean estimate of a picture under way, valid after the event `launched`."""

    id: int
    index: int
    step: int
    latents: Tensor
    drawing: Drawing
    output: OutputFormat | None
    launched: torch.cuda.Event | None


class VaeWorker:
    """One thread, and on a GPU one stream. Of several ranks, the first one alone gives pictures out.

    Ranks that divide the tiles of pictures do the same work in the same order, that of the engine's commands.

    emit: receives Drawn and Previewed; fail: the error of a picture; is_drawing: whether an id is still on a canvas.
    """

    def __init__(
        self,
        model: Bagel,
        heartbeat: Heartbeat,
        *,
        emit: Callable[[Event], None],
        fail: Callable[[int, Exception], None],
        is_drawing: Callable[[int], bool],
    ) -> None:
        self._model, self._device, self._heartbeat = model, model.device, heartbeat
        self._emit, self._fail, self._is_drawing = emit, fail, is_drawing
        self._tiles = model.groups.vae_decode
        self._gives_out = model.groups.world.index == 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vae")
        self._jobs: set[Future[None]] = set()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def launched(self) -> torch.cuda.Event | None:
        """An event after all work that was launched so far; None on a CPU, where that work is done."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream else None

    def finish(self, picture: FinishedPicture) -> None:
        """Decode a picture; emits Drawn."""
        self._submit(self._finish, picture)

    def preview(self, picture: EarlyPicture) -> None:
        """Decode a preview; emits Previewed."""
        self._submit(self._preview, picture)

    def warm_up(self, latents: Tensor, grid: tuple[int, int]) -> None:
        """Decode latents as a preview and as a finished picture, wait for both, and drop them."""
        launched = self.launched()
        for quick in (True, False):
            # Another thread or stream would not do: each has library handles and memory of its own.
            decoding = self._thread.submit(self._image, latents, grid, launched, quick=quick)
            with suppress(NotFinite):  # nobody wants this picture
                decoding.result()

    @property
    def busy(self) -> bool:
        """Whether anything is being decoded, or waits for it."""
        return bool(self._jobs)

    def close(self) -> None:
        """Wait for the work under way, and end."""
        self._thread.shutdown()

    def _submit(self, work: Callable[[Any], None], job: object) -> None:
        if not self._gives_out and self._tiles.size == 1:
            return
        future = self._thread.submit(self._watched, work, job)
        # Before the callback is added: it may run at once.
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)

    def _watched(self, work: Callable[[Any], None], job: object) -> None:
        with self._heartbeat.work():
            work(job)

    def _finish(self, job: FinishedPicture) -> None:
        start = time.perf_counter()
        try:
            made = self._image(job.latents, job.grid, job.launched)
            if made is None:
                return
            image, decoding = made
            picture = _given_out(image, job.output)
            profile = {}
            if job.windows is not None:
                profile = job.windows.stages() | {"decode": seconds_between(*decoding)}
            seconds = time.perf_counter() - start
            self._emit(Drawn(job.id, picture, image.width, image.height, seconds, profile))
        except Exception as error:
            self._fail(job.id, error)

    def _preview(self, job: EarlyPicture) -> None:
        try:
            # A finished picture has left its canvas too, but its preview is still wanted.
            if not self._agreed(self._is_drawing(job.id) or job.drawing.finished):
                return  # the request was cancelled
            made = self._image(job.latents, job.drawing.picture.grid, job.launched, quick=True)
            if made is None:
                return
            image, _ = made
            picture = _given_out(image, job.output)
            self._emit(Previewed(job.id, job.index, job.step, picture, image.width, image.height))
        except Exception as error:
            if self._tiles.size > 1 and not isinstance(error, BagelError):
                self._fail(job.id, error)  # the other ranks wait for this one's tiles
                return
            # The picture itself may come out right, and reports an error if it does not.
            logger.warning("a preview failed", extra={"fields": {"why": str(error)}})

    def _agreed(self, wanted: bool) -> bool:
        """What the first rank decides, as it depends on time: all ranks decode a picture, or none."""
        if self._tiles.size == 1:
            return wanted
        with self._on_stream():
            return bool(self._tiles.share(torch.tensor([wanted], device=self._device)).item())

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _image(
        self, latents: Tensor, grid: tuple[int, int], launched: torch.cuda.Event | None, *, quick: bool = False
    ) -> tuple[Image.Image, tuple[Moment, Moment]] | None:
        """The image of latents, and when the VAE began and ended on the device; None on a rank that helps another.

        Raises NotFinite for one that overflowed.
        """
        with self._on_stream():
            if launched is not None and self._stream is not None:
                self._stream.wait_event(launched)
                # Allocated on the other stream, which would otherwise reuse their memory too early.
                latents.record_stream(self._stream)
            if not self._gives_out:
                help_decode_picture(self._model, latents, grid, quick=quick)
                return None
            begin = mark(self._device)
            decoded = decode_picture(self._model, latents, grid, quick=quick)
            end = mark(self._device)
            # Only here: NaN of any step reaches the picture, and a check a step would make the host wait.
            if not decoded.isfinite().all():
                raise NotFinite("the picture overflowed; use smaller cfg scales, a smaller timestep_shift or float32")
            return to_image(decoded), (begin, end)


def _given_out(image: Image.Image, output: OutputFormat | None) -> bytes | Image.Image:
    return image if output is None else output.encode(image)
