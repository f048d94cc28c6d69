"""The clean latents of input images: what the VAE makes of them, with the noise of its posterior."""

from __future__ import annotations

from collections import OrderedDict

import torch
from PIL.Image import Image
from torch import Tensor

from bagel.engine.segments import Segment
from bagel.images import pixel_digest
from bagel.model.attention import upload
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_pixels

MOST_AHEAD = 32
"""Images encoded ahead of their contexts; each takes 2 MiB of the device at most with the public model."""


class InputLatents:
    """Encodes images, perhaps before their context is known."""

    def __init__(self, model: Bagel) -> None:
        self._model = model
        # By identity, as pixels are compared slower than they are encoded. The image keeps its id.
        self._ahead: OrderedDict[int, tuple[Image, Tensor, Tensor]] = OrderedDict()

    @torch.inference_mode()
    def encode_ahead(self, image: Image) -> None:
        """Encode an image, resized for the VAE, that a segment will have: this very object."""
        self._ahead[id(image)] = image, *self._encode(image)
        while len(self._ahead) > MOST_AHEAD:
            self._ahead.popitem(last=False)

    def of(self, segment: Segment) -> Tensor:
        """The clean latent of a VAE segment's image, [z, h, w], sampled with the segment's posterior noise."""
        image = segment.image
        assert image is not None and segment.posterior is not None
        if id(image) in self._ahead:
            _, mean, logvar = self._ahead.pop(id(image))
        else:
            mean, logvar = self._encode(image)
        # Drawn on the CPU and moved, as each device's own generator draws other numbers.
        noise = segment.posterior.draw(tuple(mean.shape), pixel_digest(image))
        return self._model.autoencoder().sample(mean, logvar, upload(noise, torch.float32, mean.device))[0]

    def _encode(self, image: Image) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the VAE's posterior."""
        return self._model.autoencoder().encode(to_pixels(image, self._model.device)[None])
