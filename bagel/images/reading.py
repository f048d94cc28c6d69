"""Read image files, from a path or from bytes: decode them in full, or take their size from the headers alone."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageChops, TiffImagePlugin, UnidentifiedImageError

from bagel.errors import InvalidImage
from bagel.images.colour import to_rgb, upright_size
from bagel.images.jpeg import END, Jpeg, read_jpeg
from bagel.images.png import SIGNATURE, read_png

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_INPUT_PIXELS = 64_000_000
MAX_INPUT_SIDE = 65_535
"""Longest side of an input, JPEG's own limit. Pillow's filter tables grow with a side, however small the area is."""
MAX_INPUT_BYTES = 64 * 2**20

StrPath = str | os.PathLike[str]

_ANY_FORMAT = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_PATH_HINT = f"give the path of a {_ANY_FORMAT} file"
_TIFF_BEGINS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_FILE_BYTES = 2**30  # of a file given by its path; several times 64 uncompressed megapixels
_CODES = (b"\x55" * 512, b"\xaa" * 512)  # two continuations of a JPEG's coded data, see _decode_unended


def load_image(source: StrPath | bytes) -> Image.Image:
    """Read a path, or a file's bytes, into an upright sRGB image: decoded in full, without metadata.

    An animation gives its first frame. Raises InvalidImage for a file that is unreadable, damaged or too large.
    """
    data, name = _read(source)
    with _as_invalid_image(data, name):
        return _decode(data, name)


def image_size(data: bytes) -> tuple[int, int]:
    """The upright (width, height) of an image file, from its headers. Raises InvalidImage as load_image does."""
    data, name = _read(data)
    with _as_invalid_image(data, name), _opened(data, name, pixels=False) as image:
        return upright_size(image)


def check_file(path: StrPath) -> None:
    """Refuse a path that would hang when read (a pipe) or fail obscurely (a folder)."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise InvalidImage("image", f"no file {shown(path)}; {_PATH_HINT}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise InvalidImage("image", f"cannot read {shown(path)}: {reason(error)}; {_PATH_HINT}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise InvalidImage("image", f"{shown(path)} is {kind}; {_PATH_HINT}")
    if found.st_size == 0:
        raise InvalidImage("image", f"{shown(path)} is empty (0 bytes); {_PATH_HINT}")
    if found.st_size > _MAX_FILE_BYTES:
        raise InvalidImage("image", f"{shown(path)} has {found.st_size} bytes; an image may have {_MAX_FILE_BYTES}")


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse an image without pixels, or with too many."""
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImage("image", f"{name} is {width}x{height} pixels; it must have at least one")
    if width * height > MAX_INPUT_PIXELS or max(size) > MAX_INPUT_SIDE:
        raise _too_large(name, f"{width}x{height} pixels")


def shown(path: StrPath) -> str:
    """A path for a message."""
    return repr(os.fspath(path))  # quoted, so that odd names stay visible and in one line


def reason(error: BaseException) -> str:
    """An error's text in one line, without the path that a system error repeats."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _read(source: StrPath | bytes) -> tuple[bytes, str]:
    """A file's bytes, and its name for messages."""
    if isinstance(source, bytes):
        if not source:
            raise InvalidImage("image", f"the image is empty (0 bytes); send the bytes of a {_ANY_FORMAT} file")
        if len(source) > MAX_INPUT_BYTES:
            raise InvalidImage("image", f"the image has {len(source)} bytes; send at most {MAX_INPUT_BYTES}")
        return source, "the image"
    check_file(source)
    try:
        with open(source, "rb") as file:
            return file.read(), shown(source)
    except OSError as error:
        raise InvalidImage("image", f"cannot read {shown(source)}: {reason(error)}; {_PATH_HINT}") from error


@contextmanager
def _as_invalid_image(data: bytes, name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an InvalidImage that says what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which nothing here uses
            yield
    except InvalidImage:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, f"of more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(
            "image", f"{name} is no intact {_ANY_FORMAT} file (it begins with {data[:8]!r}); save it as one of these"
        ) from error
    except MemoryError:
        raise InvalidImage("image", f"{name} takes too much memory to decode; save it as a PNG or JPEG") from None
    except Exception as error:  # Pillow's decoders raise almost any class on damaged data: OSError, SyntaxError, …
        raise InvalidImage(
            "image", f"{name} is damaged and cannot be decoded ({reason(error)}); save or send it again"
        ) from error


def _decode(data: bytes, name: str) -> Image.Image:
    """Decode the first frame of a file's bytes, upright and in sRGB."""
    if data.startswith(b"\xff\xd8"):
        jpeg = read_jpeg(data, name)
        return _decode_unended(jpeg, name) if jpeg.scans and not jpeg.ended else _decode_open(jpeg.data, name)
    return _decode_open(data, name)


def _decode_open(data: bytes, name: str) -> Image.Image:
    with _opened(data, name) as image:
        return to_rgb(image, name)


def _decode_unended(jpeg: Jpeg, name: str) -> Image.Image:
    """Decode a JPEG that lacks its end marker; ValueError if it lacks coded data too.

    The decoder silently invents missing data. So the file is decoded again with other data appended: if a pixel
    changes, something was missing.
    """
    image = _decode_open(jpeg.data + END, name)
    others = (_decode_open(jpeg.data + code + END, name) for code in _CODES)
    cut = not jpeg.whole or jpeg.data.endswith(bytes(4))  # a broken upload is often filled up with zeros
    if cut or any(ImageChops.difference(image, other).getbbox() for other in others):
        raise ValueError("image file is truncated")
    return image


@contextmanager
def _opened(data: bytes, name: str, *, pixels: bool = True) -> Iterator[Image.Image]:
    """Open an image and check its size. With pixels=False the pixels are dropped first, so it cannot be decoded."""
    if data.startswith(SIGNATURE):
        png = read_png(data, pixels=pixels)
        with Image.open(io.BytesIO(png.data), formats=("PNG",)) as image:
            check_size(image.size, name)
            if png.profile is not None:
                image.info["icc_profile"] = png.profile
            yield image
        return
    if data.startswith(b"\xff\xd8"):
        jpeg = read_jpeg(data, name, pixels=pixels)
        data = jpeg.data if pixels else jpeg.header or data
    file = io.BytesIO(data)
    with _Tiff(file) if data.startswith(_TIFF_BEGINS) else Image.open(file, formats=FORMATS) as image:
        check_size(image.size, name)
        yield image


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF that Pillow does not turn upright: to do so it parses all metadata, and fails if any of it is odd."""

    def load_end(self) -> None:
        """Leave the picture as the file has it; `to_rgb` turns it upright."""


def _too_large(name: str, seen: str) -> InvalidImage:
    limits = f"{MAX_INPUT_PIXELS} pixels in all and {MAX_INPUT_SIDE} a side"
    return InvalidImage("image", f"{name} is {seen}; scale it down to at most {limits}")
