"""Data URLs of callers, with images in them."""

from __future__ import annotations

import string
from collections.abc import Iterable

from bagel.errors import InvalidImage
from bagel_gateway.rest.data_urls import data_of
from tests.fuzz.target import Target

ALPHABET = (string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/").encode()


def check(data: bytes) -> None:
    url = "data:" + data.decode("utf-8", "surrogateescape")
    file = data_of(url, "image")
    header, _, rest = url[len("data:") :].partition(",")
    raw = unescaped(rest.encode())
    coded = "base64" in [each.strip().lower() for each in header.split(";")[1:]]
    assert file and file == (bits(raw) if coded else raw), "an independent reading gives another file"


def unescaped(text: bytes) -> bytes:
    """RFC 3986: %XX is a byte; anything else is itself."""
    out, at = bytearray(), 0
    while at < len(text):
        digits = text[at + 1 : at + 3]
        if text[at : at + 1] == b"%" and len(digits) == 2 and all(chr(each) in string.hexdigits for each in digits):
            out.append(int(digits, 16))
            at += 3
        else:
            out.append(text[at])
            at += 1
    return bytes(out)


def bits(text: bytes) -> bytes:
    """RFC 4648: six bits a character, in either alphabet; what does not fill a byte is dropped."""
    known = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
    value = 0
    for each in known:
        value = value << 6 | ALPHABET.index(each)
    count = len(known) * 6 // 8
    return (value >> len(known) * 6 - count * 8).to_bytes(count, "big")


def seeds() -> Iterable[bytes]:
    yield b"image/png;base64,iVBORw0KGgo="
    yield b"image/png;base64,iVBORw0KGgo"
    yield b"; BASE64 ,_-8%2B%2F \r\n"
    yield b"image/gif,GIF89a%01%00%01%00%80"
    yield b',a;base64,x"'


WORDS = b";base64, %2C %3D == image/png charset=utf-8".split()
TARGET = Target(check, (InvalidImage,), seeds, words=tuple(WORDS))
