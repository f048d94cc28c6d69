"""The resize rule: which size an input image gets for the model. Pillow only: no torch here.

The rule is the reference's (ByteDance-Seed/Bagel, data/transforms.py `MaxLongEdgeMinShortEdgeResize` and
`InterleaveInferencer`). Sizes are (width, height) in pixels throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from bagel.errors import CheckpointError, InvalidImage
from bagel.images.colour import pixel_digest, to_rgb

MAX_PIXELS = 1_806_336
"""Area in pixels above which the resize rule scales once more (the reference's 14 * 14 * 9216)."""


@dataclass(frozen=True)
class ImageTransform:
    """Bounds of a resize in pixels: the longest side, the shortest side, and the stride that divides both.

    Raises CheckpointError unless 1 <= stride <= min_size <= max_size, since a checkpoint's config.json sets them.
    """

    max_size: int
    min_size: int
    stride: int

    def __post_init__(self) -> None:
        values = (self.max_size, self.min_size, self.stride)
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
        if not whole or not 1 <= self.stride <= self.min_size <= self.max_size:
            raise CheckpointError(
                f"image transform {list(values)} is not valid; it must be three whole numbers [max, min, stride] "
                f"with 1 <= stride <= min <= max, like [1024, 512, 16]"
            )

    @classmethod
    def from_list(cls, values: object) -> ImageTransform:
        """Read [max, min, stride] as config.json has it; raises CheckpointError for anything else."""
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise CheckpointError(f"image transform {values!r} is not [max, min, stride], like [1024, 512, 16]")
        return cls(*values)


VAE_TRANSFORM = ImageTransform(1024, 512, 16)
VIT_TRANSFORM = ImageTransform(980, 224, 14)


@dataclass(frozen=True)
class PreparedImage:
    """An input image, resized for the model.

    size: (width, height) after the first VAE resize, the default size of an edit's picture. vae, vit: the RGB images
    that the two encoders take; None for an encoder that is not used. digests: the `pixel_digest` of each, where it is
    known.
    """

    size: tuple[int, int]
    vae: Image.Image | None
    vit: Image.Image | None
    digests: tuple[bytes | None, bytes | None] = (None, None)

    @cached_property
    def vae_digest(self) -> bytes:
        """`pixel_digest` of what the VAE takes."""
        assert self.vae is not None
        return self.digests[0] or pixel_digest(self.vae)

    @cached_property
    def vit_digest(self) -> bytes:
        """`pixel_digest` of what the ViT takes."""
        assert self.vit is not None
        return self.digests[1] or pixel_digest(self.vit)


@dataclass(frozen=True)
class UnreadImage:
    """An input image that this process passes on without decoding it. size: its upright (width, height)."""

    size: tuple[int, int]


@dataclass(frozen=True)
class ResizedImage:
    """An input image that another process has decoded and resized. size: its upright (width, height) before that."""

    size: tuple[int, int]
    prepared: PreparedImage


InputImage = Image.Image | UnreadImage | ResizedImage
"""An image of a prompt: decoded in this process, not decoded at all, or decoded in another process."""


def resized_size(width: int, height: int, transform: ImageTransform) -> tuple[int, int]:
    """(width, height) after the reference's resize rule; both are positive multiples of the stride.

    The first scaling prefers min_size to max_size, the last one enforces max_size; so an extreme strip loses its
    shape and ends as max_size x stride. Raises InvalidImage for a side below 1.
    """
    if width < 1 or height < 1:
        raise InvalidImage("image", f"the image is {width}x{height} pixels; it must have at least one")
    scale = max(min(1.0, transform.max_size / max(width, height)), transform.min_size / min(width, height))
    size = _scaled((width, height), scale, transform.stride)
    if (area := size[0] * size[1]) > MAX_PIXELS:
        # The area's factor, applied to both sides, overshoots (a square root is missing); the model was trained so.
        size = _scaled(size, MAX_PIXELS / area, transform.stride)
    if (longest := max(size)) > transform.max_size:
        size = _scaled(size, transform.max_size / longest, transform.stride)
    return size


def _scaled(size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """Multiply both sides by scale, then round to whole pixels and to the stride; both rounds take halves to even."""
    width, height = (max(stride, round(round(side * scale) / stride) * stride) for side in size)
    return width, height


def resize(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """Resize an RGB image by the rule, bicubic; returns the same object if its size is right already."""
    size = resized_size(*image.size, transform)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def encoder_images(
    first: Image.Image,
    vae_transform: ImageTransform,
    vit_transform: ImageTransform,
    *,
    for_generation: bool,
    for_understanding: bool,
) -> Iterator[tuple[str, Image.Image]]:
    """What the encoders take, "vae" (for_generation) before "vit" (for_understanding), each made when it is asked for.

    first: the image after the VAE's resize, which comes first even if only the ViT sees the image.
    """
    if for_generation:
        # The reference resizes twice; the second time changes nothing with the public transforms, but can with others.
        yield "vae", resize(first, vae_transform)
    if for_understanding:
        yield "vit", resize(first, vit_transform)


def prepare(
    image: Image.Image,
    vae_transform: ImageTransform = VAE_TRANSFORM,
    vit_transform: ImageTransform = VIT_TRANSFORM,
    *,
    for_generation: bool,
    for_understanding: bool = True,
) -> PreparedImage:
    """Resize an image as the reference does for the VAE (for_generation) and the ViT (for_understanding).

    Raises InvalidImage as to_rgb does.
    """
    first = resize(to_rgb(image), vae_transform)
    made = dict(
        encoder_images(
            first, vae_transform, vit_transform, for_generation=for_generation, for_understanding=for_understanding
        )
    )
    return PreparedImage(first.size, made.get("vae"), made.get("vit"))
