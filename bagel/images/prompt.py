"""The images of a prompt that came over the wire, read by a pool: one after the other, as each may be large."""

from __future__ import annotations

from collections.abc import Sequence

from bagel.images.pool import ImagePool
from bagel.images.transforms import ImageTransform, ResizedImage
from bagel.rpc.convert import check_prompt, image_purposes
from bagel.v1 import common_pb2


async def resized_images(
    pool: ImagePool, parts: Sequence[common_pb2.Part], model: common_pb2.ModelInfo, *, for_generation: bool = False
) -> list[ResizedImage]:
    """The images of a prompt's parts in order, resized for a model; for_generation as of `prompt_from_wire`.

    Raises InvalidRequest for a prompt that cannot be served, before any image is read, and InvalidImage.
    """
    check_prompt(parts)
    vae, vit = (ImageTransform(each.max, each.min, each.stride) for each in (model.vae_transform, model.vit_transform))
    images = []
    for part in parts:
        if part.HasField("image"):
            purposes = image_purposes(part.image, for_generation=for_generation)
            images.append(await pool.resized(part.image.data, vae, vit, **purposes))
    return images
