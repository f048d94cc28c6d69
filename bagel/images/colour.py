"""One rule for every input: whatever Pillow opens becomes an upright, opaque sRGB image with 8 bits per channel.

So the model sees the same picture whether it arrives as a path, as bytes or as a Pillow image.
"""

from __future__ import annotations

import hashlib
import struct
from io import BytesIO
from typing import Any

from PIL import ExifTags, Image, ImageChops, TiffImagePlugin

from bagel.errors import InvalidImage

MAX_PROFILE_BYTES = 16 * 2**20
"""The largest colour profile that is read. Profiles of printing presses have a few MB."""

_EIGHT_BIT_MODES = frozenset(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
_SIXTEEN_BIT_MODES = frozenset(["I;16", "I;16L", "I;16B", "I;16N"])
_GREY_MODES = frozenset(["1", "L", "LA", "La"])
# The colour space that a profile must name to fit an image of each mode.
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# The tables of an sRGB profile round, so it may move a colour by one step of 255.
_SAME = 1
_TAG_BITS, _TAG_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Return a new RGB image without metadata: upright, in sRGB, with any transparency composed over white.

    Applies the EXIF orientation and the colour profile; an unreadable one counts as absent. Keeps the upper 8 of 16
    bits per channel. Raises InvalidImage for an image without pixels and for any other pixel format; `name` is what the
    message calls the image.
    """
    if min(image.size) < 1:
        raise InvalidImage("image", f"{name} is {image.width}x{image.height} pixels; it must have at least one")
    if image.mode not in _EIGHT_BIT_MODES | _SIXTEEN_BIT_MODES:  # Pillow would clip these to white without a word
        raise InvalidImage(
            "image", f"{name} has the pixel format {image.mode}; save it with 8 bits per channel, RGB or greyscale"
        )
    image.load()
    colours, alpha = _colours(image)
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and 0 < len(profile) <= MAX_PROFILE_BYTES:
        colours = _to_srgb(colours, profile)
    rgb = colours.convert("RGB")
    if alpha is not None:
        opaque = Image.new("RGB", rgb.size, (255, 255, 255))
        opaque.paste(rgb, mask=alpha)
        rgb = opaque
    rgb.info = {}
    method = _UPRIGHT.get(orientation(image))
    return rgb if method is None else rgb.transpose(method)


def plain(image: Image.Image) -> Image.Image:
    """Return the image itself if it already looks like a result of `to_rgb`; otherwise convert it."""
    bare = type(image) is Image.Image and image.mode == "RGB" and not image.info and min(image.size) > 0
    return image if bare and orientation(image) == 1 else to_rgb(image)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied; 1 if it is absent or unreadable.

    The reference gets upright arrays from its web page, so it saw phone photos upright too.
    """
    # ImageOps.exif_transpose would rewrite the EXIF block and fail on odd ones; a PNG's own getexif would decode it.
    try:
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's metadata readers raise almost any class, and odd metadata must not cost the picture
        found = _tags(image).get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) that an image will have once it is upright; nothing is decoded."""
    # Pillow swaps the sides of a TIFF itself, as soon as it opens the file.
    turned = orientation(image) >= 5 and not isinstance(image, TiffImagePlugin.TiffImageFile)
    width, height = image.size
    return (height, width) if turned else (width, height)


def pixel_digest(image: Image.Image) -> bytes:
    """16 bytes of BLAKE2b over the size and the RGB bytes; two images share it only if the model sees no difference."""
    return digest_of_pixels(image.size, plain(image).tobytes())


def digest_of_pixels(size: tuple[int, int], pixels: bytes | memoryview) -> bytes:
    """`pixel_digest` of an upright RGB image, from its bytes row by row. Other threads run meanwhile."""
    digest = hashlib.blake2b(struct.pack("<QQ", *size), digest_size=16)
    digest.update(pixels)
    return digest.digest()


def _colours(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into its colours (L, RGB or CMYK) and its alpha channel; None if it is opaque."""
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        grey = image.mode in _GREY_MODES
        return layer.getchannel("R") if grey else layer.convert("RGB"), layer.getchannel("A")
    if image.mode in _GREY_MODES:
        return image.convert("L"), None
    return (image if image.mode in _SPACES else image.convert("RGB")), None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce 16-bit grey to 8 bits by its upper byte, as Pillow's decoders do for 16-bit colours."""
    tags = _tags(image)
    data = image.tobytes("raw", "I;16B")
    grey = Image.frombytes("L", image.im.size, data[::2])
    if tags.get(_TAG_BITS) == (12,):  # Pillow leaves a 12-bit value in the lower twelve of the sixteen bits
        low = Image.frombytes("L", image.im.size, data[1::2])
        grey = ImageChops.add(grey.point([value * 16 % 256 for value in range(256)]), low.point(lambda low: low >> 4))
    if tags.get(_TAG_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = ImageChops.invert(grey)
    if isinstance(key := image.info.get("transparency"), int):
        grey.info["transparency"] = key >> 8
    return grey


def _to_srgb(colours: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours (L, RGB or CMYK) from their profile to sRGB.

    Colours stay as they are if the profile is sRGB itself, belongs to another colour space or cannot be read.
    """
    from PIL import ImageCms  # imported late, since few pictures have a profile

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if str(source.profile.xcolor_space).strip() != _SPACES[colours.mode]:
            return colours
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), colours.mode, "RGB")
        return colours if _is_srgb(transform, colours.mode) else ImageCms.applyTransform(colours, transform)  # type: ignore[return-value]
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return colours


def _tags(image: Image.Image) -> Any:
    """The tags of a TIFF; an empty mapping for any other format."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _is_srgb(transform: Any, mode: str) -> bool:
    """Whether a transform keeps a lattice of colours. An sRGB profile is then not applied, so it rounds no pixel."""
    if mode == "CMYK":
        return False
    steps = range(0, 256, 15)
    if mode == "L":
        probe = Image.frombytes("L", (256, 1), bytes(range(256)))
    else:
        lattice = bytes(value for red in steps for green in steps for blue in steps for value in (red, green, blue))
        probe = Image.frombytes("RGB", (len(steps) ** 2, len(steps)), lattice)
    moved = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    return max(moved.tobytes()) <= _SAME
