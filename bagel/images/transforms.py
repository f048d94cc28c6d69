"""The resize rule: what size an input image has for the model. Pillow only: no torch here.

The rule is the reference's (ByteDance-Seed/Bagel, data/transforms.py `MaxLongEdgeMinShortEdgeResize` and
`InterleaveInferencer`). Sizes are (width, height) in pixels throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from bagel.errors import CheckpointError, InvalidImage
from bagel.images.colour import to_rgb

MAX_PIXELS = 1_806_336
"""Area above which the resize rule scales once more (the reference's 14 * 14 * 9216)."""


@dataclass(frozen=True)
class ImageTransform:
    """Bounds of a resize in pixels: longest side, shortest side, and what both must be a multiple of.

    Raises CheckpointError unless 1 <= stride <= min_size <= max_size: the values come from its config.json.
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

    size: (width, height) after the first VAE resize, which is what an edit draws by default; vae and vit:
    the RGB images to encode, None where that path is not wanted.
    """

    size: tuple[int, int]
    vae: Image.Image | None
    vit: Image.Image | None


@dataclass(frozen=True)
class UnreadImage:
    """An input image that is not decoded here; its file goes on as it came. size: its upright (width, height)."""

    size: tuple[int, int]


@dataclass(frozen=True)
class ResizedImage:
    """An input image that another process has decoded and resized. size: its upright (width, height) as it came."""

    size: tuple[int, int]
    prepared: PreparedImage


InputImage = Image.Image | UnreadImage | ResizedImage
"""An image of a prompt: decoded in this process, not at all, or in another."""


def resized_size(width: int, height: int, transform: ImageTransform) -> tuple[int, int]:
    """(width, height) after the reference's resize rule; both are positive multiples of the stride.

    min_size wins over max_size in the first scaling, max_size over everything in the last, so an extreme strip
    ends as max_size x stride, its shape lost. Raises InvalidImage for a side below 1.
    """
    if width < 1 or height < 1:
        raise InvalidImage("image", f"the image is {width}x{height} pixels; it must have at least one")
    scale = max(min(1.0, transform.max_size / max(width, height)), transform.min_size / min(width, height))
    size = _scaled((width, height), scale, transform.stride)
    if (area := size[0] * size[1]) > MAX_PIXELS:
        # An area factor applied to both sides overshoots (it lacks a square root), but so the model was trained.
        size = _scaled(size, MAX_PIXELS / area, transform.stride)
    if (longest := max(size)) > transform.max_size:
        size = _scaled(size, transform.max_size / longest, transform.stride)
    return size


def _scaled(size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """Both sides times scale, rounded to whole pixels, then to the stride. Both rounds take halves to even."""
    width, height = (max(stride, round(round(side * scale) / stride) * stride) for side in size)
    return width, height


def resize(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """An RGB image by the resize rule, bicubic; the same object if its size is right already."""
    size = resized_size(*image.size, transform)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def prepare(
    image: Image.Image,
    vae_transform: ImageTransform = VAE_TRANSFORM,
    vit_transform: ImageTransform = VIT_TRANSFORM,
    *,
    for_generation: bool,
    for_understanding: bool = True,
) -> PreparedImage:
    """Resize an image as the reference does for the VAE (for_generation) and the ViT (for_understanding).

    The VAE rule comes first even if only the ViT looks. Before VAE encoding it comes a second time, which is a
    no-op with the public transforms but not with every one. Raises InvalidImage as to_rgb does.
    """
    first = resize(to_rgb(image), vae_transform)
    return PreparedImage(
        size=first.size,
        vae=resize(first, vae_transform) if for_generation else None,
        vit=resize(first, vit_transform) if for_understanding else None,
    )
