"""Save pictures as PNG files that carry their settings, and choose the files' names."""

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

from PIL import Image

from bagel.errors import BagelError, InvalidRequest, OutputFailed
from bagel.images.embedding import png_texts
from bagel.images.reading import StrPath, reason, shown

_NAME_CHARACTERS, _NAME_BYTES = 60, 200
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def save_png(image: Image.Image, path: StrPath, settings: Mapping[str, str]) -> None:
    """Write a PNG with the settings as its text chunks; the file appears whole or not at all.

    Raises InvalidRequest (field output) if the path cannot be written to, OutputFailed if the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with part.open("xb") as file:
            image.save(file, format="PNG", pnginfo=png_texts(settings))
        part.replace(path)
    except OSError as error:
        raise write_error(f"cannot write {shown(path)}", error) from error
    finally:
        with contextlib.suppress(OSError):  # after a success it no longer exists; without a folder it never did
            part.unlink()


def write_error(what: str, error: OSError) -> BagelError:
    """The error for a failed write: OutputFailed if the disk is at fault, InvalidRequest if the path is."""
    if error.errno in _DISK_ERRORS:
        return OutputFailed(f"{what}: {reason(error)}; make room, or choose another folder")
    return InvalidRequest("output", f"{what}: {reason(error)}; choose another folder")


def picture_name(prompt: str, seed: int) -> str:
    """A file name made from the prompt: 'A red circle!', 42 -> 'a-red-circle_seed42.png'.

    Keeps letters and digits of any script (NFKC, lower-case) and turns the rest into '-'; at most 60 characters and
    200 bytes precede '_seed'. The suffix also avoids the names that Windows reserves (con, nul).
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).lower())
    kept: list[str] = []
    for char in text:
        kind = unicodedata.category(char)[0]
        # A mark is a vowel in many scripts; without a letter before it, it is part of an emoji.
        kept.append(char if kind in "LN" or (kind == "M" and kept and kept[-1] != "-") else "-")
    slug = re.sub("-+", "-", "".join(kept)).strip("-")[:_NAME_CHARACTERS]
    slug = slug.encode("utf-8")[:_NAME_BYTES].decode("utf-8", "ignore").strip("-")
    return f"{slug or 'picture'}_seed{seed}.png"


def free_path(folder: StrPath, name: str) -> Path:
    """folder/name, or the first of name-2, name-3, … (before the suffix) that does not exist yet."""
    first = Path(folder) / name
    numbered = (first.with_name(f"{first.stem}-{number}{first.suffix}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not os.path.lexists(path))
