"""Pictures as files: PNGs with their settings, and file names."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from bagel.errors import BagelError, InvalidImage, InvalidRequest, OutputFailed
from bagel.images.reading import StrPath, check_file, check_size, reason, shown

_NAME_CHARACTERS, _NAME_BYTES = 60, 200
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def save_png(image: Image.Image, path: StrPath, settings: Mapping[str, str]) -> None:
    """Write a PNG with the settings as its text chunks; the file appears whole or not at all.

    Raises InvalidRequest (field output) if it cannot be written, such as into a folder that is not there, OutputFailed
    if the disk is full.
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
        raise write_error(f"cannot write {shown(path)}", error) from error
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well, never there if the folder is not
            part.unlink()


def write_error(what: str, error: OSError) -> BagelError:
    """The error of something that could not be written: its disk's, or that of who chose the place."""
    if error.errno in _DISK_ERRORS:
        return OutputFailed(f"{what}: {reason(error)}; make room, or choose another folder")
    return InvalidRequest("output", f"{what}: {reason(error)}; choose another folder")


def read_settings(path: StrPath) -> dict[str, str]:
    """The text chunks of a PNG, as save_png wrote them; raises InvalidImage if it is not a readable PNG."""
    check_file(path)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_size(image.size, shown(path))
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {str(name): str(value) for name, value in image.text.items()}
    except InvalidImage:
        raise
    except Exception as error:  # as in reading.py
        raise InvalidImage(
            "image", f"{shown(path)} is not a readable PNG ({reason(error)}); give a picture saved here"
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
