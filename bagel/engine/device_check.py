"""Whether the device still has memory to draw: tried once memory ran out, so that health is true."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from bagel.engine.context import Context
from bagel.engine.decoding import decode_picture
from bagel.engine.events import Health
from bagel.engine.memory import is_out_of_memory, kv_space_of
from bagel.engine.picture import Picture
from bagel.engine.sampler import Canvas
from bagel.model.bagel import Bagel
from bagel.prompts import BranchName
from bagel.request import ImageSettings

LOOK_AGAIN_S = 5.0

logger = logging.getLogger(__name__)


class DeviceCheck:
    """Draws a trial picture after memory ran out, when nothing else is under way.

    An engine whose device another process fills fails every picture; it is not healthy until a trial succeeds.
    """

    def __init__(self, model: Bagel, emit: Callable[[Health], None], free: Callable[[], None]) -> None:
        """emit: receives Health when it changes; free: gives back memory that is only kept for later use."""
        self._model, self._emit, self._free = model, emit, free
        self._ran_out = False
        self._to_try = False
        self._full = False

    @property
    def look_again_s(self) -> float | None:
        """Seconds after which to look again although nothing happened; None if there is no need."""
        # A trial may wait for a picture that is still being decoded, which no command follows.
        return LOOK_AGAIN_S if self._full or self._to_try else None

    def ran_out(self) -> None:
        """Memory ran out in some work. From any thread."""
        self._ran_out = True

    def look(self, *, idle: bool, grid: tuple[int, int]) -> None:
        """Between two commands: free what can be freed, and try once nothing is under way.

        grid: latent rows and columns of the latest picture, which a trial draws.
        """
        if self._ran_out:
            self._ran_out = False
            self._free()
            if self._model.device.type == "cuda":
                # PyTorch keeps what was freed in blocks that a larger tensor may not fit.
                torch.cuda.empty_cache()
            self._to_try = True
        # Pictures under way hold memory: a trial beside them may fail though nothing is wrong.
        if (self._to_try or self._full) and idle:
            self._to_try = False
            self._conclude(full=not self._can_draw(grid))

    def _conclude(self, *, full: bool) -> None:
        if full != self._full:
            self._full = full
            logger.warning("the device has no memory to draw" if full else "the device can draw again")
            self._emit(Health(not full))

    def _can_draw(self, grid: tuple[int, int]) -> bool:
        """Whether memory suffices for a step of a picture without a context, and to decode it."""
        # One branch, and two times are one Euler step: the least work that tries everything.
        settings = ImageSettings(steps=2, cfg_text_scale=1.0)
        try:
            rows, columns = self._trial_grid(grid)
            noise = torch.zeros(rows * columns, self._model.config.latent_features)
            picture = Picture(settings, (rows, columns), noise, {BranchName.GEN: Context()})
            canvas = Canvas(self._model, picture.tokens, kv_space_of(self._model, picture.kv_tokens(picture.tokens)))
            drawing = canvas.add(picture)
            canvas.step([drawing])
            # A value is read back, as a GPU's late errors show only when the host waits for it.
            decode_picture(self._model, drawing.latents, picture.grid).sum().item()
        except Exception as error:
            if not is_out_of_memory(error):
                logger.error("a trial picture failed", exc_info=error)
            return False
        return True

    def _trial_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The given grid, but at most that of the default size, as a huge one may rightly fail."""
        config = self._model.config
        height, width = (side // config.latent_stride for side in config.default_image_size)
        return grid if grid[0] * grid[1] <= height * width else (height, width)
