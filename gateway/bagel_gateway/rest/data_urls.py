"""Files in data URLs (RFC 2397), also as browsers, mail programs and scripts write them."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from bagel.errors import InvalidImage

_LONGEST_HEADER = 1000
_SPACE = b" \t\r\n\f\v"
_OTHER = re.compile(rb"[^A-Za-z0-9+/]")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_\-=\s]++")
_CODED_HEADER = re.compile(rb";\s*base64\s*,", re.IGNORECASE)
_HINT = "it must be like data:image/png;base64,iVBOR..."


def data_of(url: str, field: str) -> bytes:
    """The file in a data URL; InvalidImage, of the parameter `field`, that says what is wrong with it.

    Any media type and parameters, in any case. Of base64 both alphabets are read, with or without padding, white space
    and percent escapes; without `;base64` the file is percent-encoded.
    """
    comma = url.find(",", 0, _LONGEST_HEADER)
    if comma < 0:
        raise InvalidImage(field, f"an image's data URL has no comma before its data; {_HINT}")
    header, data = url[len("data:") : comma], url[comma + 1 :]
    try:
        coded = data.encode("ascii")
    except UnicodeEncodeError as error:
        raise InvalidImage(
            field, f"an image's data URL has {data[error.start]!r} at character {error.start + 1} of its data; {_HINT}"
        ) from None
    if "base64" in (parameter.strip().lower() for parameter in header.split(";")[1:]):
        return _from_base64(coded, field)
    file = unquote_to_bytes(coded)
    if not file:
        raise InvalidImage(field, f"an image's data URL has no data after its comma; {_HINT}")
    if _CODED_HEADER.search(coded[:_LONGEST_HEADER]) is not None:
        raise InvalidImage(field, "an image's data URL has a comma before its ;base64, where its data begin; write %2C")
    if _BASE64.fullmatch(coded) is not None:  # no image, as every one has other bytes
        raise InvalidImage(field, f"an image's data URL does not say that its data are base64; {_HINT}")
    return file


def _from_base64(coded: bytes, field: str) -> bytes:
    try:
        # Strictly first: most URLs are clean, and the lenient way copies the data several times.
        file = base64.b64decode(coded, validate=True)
    except binascii.Error:
        file = _from_nearly_base64(coded, field)
    if not file:
        raise InvalidImage(field, f"an image's data URL has no data after its comma; {_HINT}")
    return file


def _from_nearly_base64(coded: bytes, field: str) -> bytes:
    if b"%" in coded:
        coded = unquote_to_bytes(coded)
    coded = coded.translate(bytes.maketrans(b"-_", b"+/"), _SPACE).rstrip(b"=")
    if (other := _OTHER.search(coded)) is not None:
        what = other[0].decode("latin-1")
        raise InvalidImage(
            field, f"an image's data URL has {what!r} in its data, which is no base64; encode the file anew"
        )
    if len(coded) % 4 == 1:
        raise InvalidImage(
            field, f"an image's data URL has {len(coded)} characters of base64, which no file has: it was cut off"
        )
    return base64.b64decode(coded + b"=" * (-len(coded) % 4))
