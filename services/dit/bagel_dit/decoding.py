"""The VAE's thread: decodes and encodes pictures that are finished, or under way, beside the steps of others."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.engine.clock import Moment, WindowClock, mark, seconds_between
from bagel.engine.sampler import Picture, decode_picture
from bagel.errors import NotFinite
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_image
from bagel.rpc.convert import encode_picture
from bagel.telemetry.logs import Log
from bagel.v1 import common_pb2
from bagel_dit.messages import Drawn, Output, Previewed, Reply
from bagel_dit.pulse import Pulses

log = Log("bagel.dit.runner")


@dataclass(frozen=True)
class Last:
    """A picture whose last step is launched, to decode: its latents, once `done`."""

    id: int
    latents: Tensor
    grid: tuple[int, int]
    output: Output
    windows: WindowClock | None
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class EarlyLook:
    """A preview to decode: what its latents tend to, once `done`."""

    id: int
    index: int
    step: int
    latents: Tensor
    picture: Picture
    output: Output
    done: torch.cuda.Event | None


class Decoder:
    """One thread, and on a GPU one stream.

    send: takes the replies; tell_failed: the error of a picture; drawing: whether an id is still on a canvas.
    """

    def __init__(
        self,
        model: Bagel,
        send: Callable[[Reply], None],
        tell_failed: Callable[[int, Exception], None],
        drawing: Callable[[int], bool],
        pulses: Pulses,
    ) -> None:
        self._pulses = pulses
        self._model, self._device = model, model.device
        self._send, self._tell_failed, self._drawing = send, tell_failed, drawing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vae")
        self._jobs: set[Future[None]] = set()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def launched(self) -> torch.cuda.Event | None:
        """An event after all that was launched so far; None on a CPU, where it is done."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream else None

    def finish(self, last: Last) -> None:
        """Decode a picture; Drawn is sent when it is done."""
        self._submit(self._finish, last)

    def preview(self, look: EarlyLook) -> None:
        """Decode a preview; Previewed is sent when it is done."""
        self._submit(self._preview, look)

    @property
    def busy(self) -> bool:
        """Whether anything is being decoded, or waits for it."""
        return bool(self._jobs)

    def _submit(self, work: Callable[[Any], None], job: object) -> None:
        future = self._thread.submit(self._watched, work, job)
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)

    def _watched(self, work: Callable[[Any], None], job: object) -> None:
        with self._pulses.work():
            work(job)

    def close(self) -> None:
        """Wait for what is under way, and end."""
        self._thread.shutdown()

    def _finish(self, last: Last) -> None:
        start = time.perf_counter()
        try:
            image, decoding = self._image(last.latents, last.grid, last.done)
            data = _encode(image, last.output)
            profile = {}
            if last.windows is not None:
                profile = last.windows.stages() | {"decode": seconds_between(*decoding)}
            self._send(Drawn(last.id, data, image.width, image.height, time.perf_counter() - start, profile))
        except Exception as error:
            self._tell_failed(last.id, error)

    def _preview(self, look: EarlyLook) -> None:
        if not self._drawing(look.id) and not look.picture.finished:
            return  # it has left
        try:
            image, _ = self._image(look.latents, look.picture.grid, look.done, quick=True)
            data = _encode(image, look.output)
            self._send(Previewed(look.id, look.index, look.step, data, image.width, image.height))
        except Exception as error:  # the picture itself may come out right, and tells if it does not
            log.warning("a preview failed", why=str(error))

    def _image(
        self, latents: Tensor, grid: tuple[int, int], done: torch.cuda.Event | None, *, quick: bool = False
    ) -> tuple[Image.Image, tuple[Moment, Moment]]:
        """The image of latents that are there once `done`, and when the VAE began and ended on the device.

        Raises NotFinite for one that overflowed.
        """
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if done is not None and self._stream is not None:
                self._stream.wait_event(done)
                latents.record_stream(self._stream)
            begin = mark(self._device)
            decoded = decode_picture(self._model, latents, grid, quick=quick)
            end = mark(self._device)
            if not decoded.isfinite().all():
                raise NotFinite("the picture overflowed; use smaller cfg scales, a smaller timestep_shift or float32")
            return to_image(decoded), (begin, end)


def _encode(image: Image.Image, output: Output) -> bytes:
    return encode_picture(image, common_pb2.ImageFormat.ValueType(output.image_format), output.quality)
