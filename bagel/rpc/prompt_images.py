"""Read the images of a prompt from a message, with a pool."""

from __future__ import annotations

from collections.abc import Sequence

from bagel.images.pool import ImagePool, OnVae
from bagel.images.transforms import ImageTransform, ResizedImage
from bagel.rpc.convert import check_prompt, image_purposes
from bagel.v1 import common_pb2


async def resized_images(
    pool: ImagePool,
    parts: Sequence[common_pb2.Part],
    model: common_pb2.ModelInfo,
    *,
    for_generation: bool = False,
    on_first: OnVae | None = None,
) -> list[ResizedImage]:
    """Read a prompt's images in their order, resized for a model; for_generation is that of `prompt_from_wire`.

    on_first: the `on_vae` of `ImagePool.resized` for the first image. Raises InvalidRequest, before it reads any image,
    for a prompt that cannot be served; InvalidImage for an image.
    """
    check_prompt(parts)
    vae, vit = (ImageTransform(each.max, each.min, each.stride) for each in (model.vae_transform, model.vit_transform))
    images: list[ResizedImage] = []
    for part in parts:  # one after the other, since each may be large
        if part.HasField("image"):
            purposes = image_purposes(part.image, for_generation=for_generation)
            images.append(
                await pool.resized(
                    part.image.data,
                    vae,
                    vit,
                    for_generation=purposes["for_generation"],
                    for_understanding=purposes["for_understanding"],
                    on_vae=None if images else on_first,
                )
            )
    return images
