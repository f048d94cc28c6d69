"""The size of the picture that a request gets. No torch here, so that it is known before a model is loaded."""

from __future__ import annotations

from bagel.errors import InvalidRequest
from bagel.images import resized_size
from bagel.model.config import ModelConfig
from bagel.prompts import ImagePart
from bagel.request import Request


def picture_size(request: Request, config: ModelConfig) -> tuple[int, int]:
    """(height, width): the user's, an edit's resized input's, or the model's default; rounded down to the grid.

    Raises InvalidRequest for a side that the latent position table has no rows for.
    """
    default = config.default_image_size
    images = [part.image for part in request.prompt if isinstance(part, ImagePart)]
    if images:
        width, height = resized_size(*images[-1].size, config.vae_transform)
        default = (height, width)
    height = _side("height", request.image.height, default[0], config)
    return height, _side("width", request.image.width, default[1], config)


def _side(name: str, given: int | None, default: int, config: ModelConfig) -> int:
    stride, largest = config.latent_stride, config.max_image_size
    pixels = default if given is None else given
    if not stride <= pixels < largest + stride:
        raise InvalidRequest(name, f"{name} is {pixels}; this model draws {stride} to {largest} pixels a side")
    return pixels // stride * stride
