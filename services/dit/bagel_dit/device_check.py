"""Whether the device still has memory to draw: asked once it ran out, so that health tells the truth."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bagel.engine.context import Context
from bagel.engine.memory import is_out_of_memory
from bagel.engine.sampler import Canvas, Picture, decode_picture
from bagel.model.bagel import Bagel
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from bagel.telemetry.logs import Log
from bagel_dit.messages import Health

LOOK_AGAIN_S = 5.0

log = Log("bagel.dit.runner")


class DeviceCheck:
    """Draws a trial picture after memory ran out, when nothing else is under way.

    A runner whose device is taken by somebody else fails every picture; it is not healthy until a trial succeeds.
    """

    def __init__(self, model: Bagel, send: Callable[[Health], None], free: Callable[[], None]) -> None:
        """send: takes what changes; free: gives back memory that is only kept for later use."""
        self._model, self._send, self._free = model, send, free
        self._ran_out = False
        self._to_try = False
        self._full = False
        self.grid = (1, 1)
        """Latent rows and columns of the latest picture that was asked for: what a trial draws."""

    @property
    def look_again_s(self) -> float | None:
        """Seconds after which to look again although nothing happened; None if there is no need."""
        return LOOK_AGAIN_S if self._full else None

    def ran_out(self) -> None:
        """Memory ran out in some work. From any thread."""
        self._ran_out = True

    def look(self, idle: Callable[[], bool]) -> None:
        """Between two commands: free what can be freed, and try once nothing is under way."""
        if self._ran_out:
            self._ran_out = False
            self._free()
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
            self._to_try = True
        if (self._to_try or self._full) and idle():
            self._to_try = False
            self._conclude(full=not self._can_draw())

    def _conclude(self, *, full: bool) -> None:
        if full != self._full:
            self._full = full
            log.warning("the device has no memory to draw" if full else "the device can draw again")
            self._send(Health(not full))

    def _can_draw(self) -> bool:
        """Whether memory suffices for a step of a picture without a context, and to decode it."""
        settings = ImageSettings(steps=2, cfg_text_scale=1.0)
        try:
            rows, columns = self._trial_grid()
            noise = torch.zeros(rows * columns, self._model.config.latent_features)
            picture = Picture(settings, (rows, columns), noise, {BranchName.GEN: Context()})
            canvas = Canvas(self._model, [picture], picture.tokens)
            canvas.step([0])
            decode_picture(self._model, canvas.latents(0), picture.grid).sum().item()
        except Exception as error:
            if not is_out_of_memory(error):
                log.error("a trial picture failed", exc_info=error)
            return False
        return True

    def _trial_grid(self) -> tuple[int, int]:
        """That of the latest picture, or of the default size if that is smaller: a huge one may rightly fail."""
        config = self._model.config
        height, width = (side // config.latent_stride for side in config.default_image_size)
        rows, columns = self.grid
        return self.grid if rows * columns <= height * width else (height, width)
