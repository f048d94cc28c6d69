"""Input images as the model sees them, and pictures as files. Pillow only: no torch here.

The resize rule is the reference's (ByteDance-Seed/Bagel, data/transforms.py `MaxLongEdgeMinShortEdgeResize`
and `InterleaveInferencer`). Sizes are (width, height) in pixels throughout.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
import secrets
import stat
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from bagel.errors import CheckpointError, InvalidImage, InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 1_806_336
"""Area above which the resize rule scales once more (the reference's 14 * 14 * 9216)."""
MAX_INPUT_PIXELS = 64_000_000
MAX_INPUT_SIDE = 65_535
"""Longest side of an input; JPEG's own limit. Pillow's filter tables grow with it, whatever the area."""
MAX_INPUT_BYTES = 64 * 2**20

StrPath = str | os.PathLike[str]

_ANY_FORMAT = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_PATH_HINT = f"give the path of a {_ANY_FORMAT} file"
_EIGHT_BIT_MODES = frozenset(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NAME_CHARACTERS, _NAME_BYTES = 60, 200


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


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """A new RGB image without metadata; any transparency is composed over white.

    Raises InvalidImage for modes above 8 bits a channel, which Pillow would clip to white without a word;
    name is what the message calls the image.
    """
    if image.mode not in _EIGHT_BIT_MODES:
        raise InvalidImage(
            "image", f"{name} has the pixel format {image.mode}; save it with 8 bits per channel, RGB or greyscale"
        )
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", layer.size, (255, 255, 255))
        rgb.paste(layer, mask=layer.getchannel("A"))
        return rgb
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def load_image(source: StrPath | bytes) -> Image.Image:
    """Read a path, or a file's bytes, into an upright RGB image: decoded in full, without metadata.

    Of an animation the first frame. Raises InvalidImage for whatever cannot be read, is damaged or too large.
    """
    if isinstance(source, bytes):
        if not source:
            raise InvalidImage("image", f"the image is empty (0 bytes); send the bytes of a {_ANY_FORMAT} file")
        if len(source) > MAX_INPUT_BYTES:
            raise InvalidImage("image", f"the image has {len(source)} bytes; send at most {MAX_INPUT_BYTES}")
        return _decode(io.BytesIO(source), "the image")
    _check_file(source)
    try:
        with open(source, "rb") as file:
            return _decode(file, _shown(source))
    except OSError as error:
        raise InvalidImage("image", f"cannot read {_shown(source)}: {_reason(error)}; {_PATH_HINT}") from error


def _check_file(path: StrPath) -> None:
    """Refuse what would hang (a pipe) or fail obscurely (a folder) when it is read."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise InvalidImage("image", f"no file {_shown(path)}; {_PATH_HINT}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise InvalidImage("image", f"cannot read {_shown(path)}: {_reason(error)}; {_PATH_HINT}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise InvalidImage("image", f"{_shown(path)} is {kind}; {_PATH_HINT}")
    if found.st_size == 0:
        raise InvalidImage("image", f"{_shown(path)} is empty (0 bytes); {_PATH_HINT}")


def _decode(file: IO[bytes], name: str) -> Image.Image:
    """The first frame of an open file, upright, in RGB; its size is checked before its pixels are decoded."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.size, name)
            image.load()
            return to_rgb(_upright(image), name)
    except InvalidImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, f"of more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        raise InvalidImage(
            "image",
            f"{name} is no intact {_ANY_FORMAT} file (it begins with {file.read(8)!r}); save it as one of these",
        ) from error
    except Exception as error:  # on damaged data Pillow's decoders raise nearly everything: OSError, SyntaxError, ...
        raise InvalidImage(
            "image", f"{name} is damaged and cannot be decoded ({_reason(error)}); save or send it again"
        ) from error


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImage("image", f"{name} is {width}x{height} pixels; it must have at least one")
    if width * height > MAX_INPUT_PIXELS or max(size) > MAX_INPUT_SIDE:
        raise _too_large(name, f"{width}x{height} pixels")


def _too_large(name: str, seen: str) -> InvalidImage:
    limits = f"{MAX_INPUT_PIXELS} pixels in all and {MAX_INPUT_SIDE} a side"
    return InvalidImage("image", f"{name} is {seen}; scale it down to at most {limits}")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    The reference gets upright arrays from its web page, so it saw phone photos this way too. TIFFs are turned by
    Pillow while loading. ImageOps.exif_transpose would write the EXIF block anew and fail on odd ones.
    """
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


def pixel_digest(image: Image.Image) -> bytes:
    """BLAKE2b, 16 bytes, of the image's size and RGB bytes; equal exactly for what looks equal to the model."""
    digest = hashlib.blake2b(struct.pack("<QQ", *image.size), digest_size=16)
    digest.update(to_rgb(image).tobytes())
    return digest.digest()


def save_png(image: Image.Image, path: StrPath, settings: Mapping[str, str]) -> None:
    """Write a PNG with the settings as its text chunks; the file appears whole or not at all.

    Raises InvalidRequest (field output) if it cannot be written, such as into a folder that is not there.
    """
    path = Path(path)
    texts = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        # Lone surrogates (a prompt in bytes that are no UTF-8) must not cost the user a finished picture.
        texts.add_text(name, value.encode("utf-8", "backslashreplace").decode("utf-8"))
    part = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with part.open("xb") as file:
            image.save(file, format="PNG", pnginfo=texts)
        part.replace(path)
    except OSError as error:
        raise InvalidRequest(
            "output", f"cannot write {_shown(path)}: {_reason(error)}; choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well, never there if the folder is not
            part.unlink()


def read_settings(path: StrPath) -> dict[str, str]:
    """The text chunks of a PNG, as save_png wrote them; raises InvalidImage if it is not a readable PNG."""
    _check_file(path)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            _check_size(image.size, _shown(path))
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {str(name): str(value) for name, value in image.text.items()}
    except InvalidImage:
        raise
    except Exception as error:  # as in _decode
        raise InvalidImage(
            "image", f"{_shown(path)} is not a readable PNG ({_reason(error)}); give a picture saved here"
        ) from error


def picture_name(prompt: str, seed: int) -> str:
    """A file name that tells what is in the picture: 'A red cube!', 42 -> 'a-red-cube_seed42.png'.

    Letters and digits of any script are kept (NFKC, lower-case), the rest becomes '-'; at most 60 characters and
    200 bytes before '_seed'. The seed behind it also keeps the name clear of Windows' reserved ones (con, nul).
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).lower())
    kept: list[str] = []
    for char in text:
        kind = unicodedata.category(char)[0]
        # Marks are vowels in many scripts; without a letter before them they are parts of emoji.
        kept.append(char if kind in "LN" or (kind == "M" and kept and kept[-1] != "-") else "-")
    slug = re.sub("-+", "-", "".join(kept)).strip("-")[:_NAME_CHARACTERS]
    slug = slug.encode("utf-8")[:_NAME_BYTES].decode("utf-8", "ignore").strip("-")
    return f"{slug or 'picture'}_seed{seed}.png"


def free_path(folder: StrPath, name: str) -> Path:
    """folder/name, or name-2, name-3, … before its suffix if such a file is there already."""
    first = Path(folder) / name
    numbered = (first.with_name(f"{first.stem}-{number}{first.suffix}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not os.path.lexists(path))


def _shown(path: StrPath) -> str:
    return repr(os.fspath(path))  # quoted, so that odd names stay visible and in one line


def _reason(error: BaseException) -> str:
    """What an error says, in one line and without the path that a system error repeats."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
