"""Parse a JPEG's markers without decoding it: count its scans, see whether its end is there, drop needless metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bagel.errors import InvalidImage

MAX_SCANS = 100
"""Scans of one JPEG. Encoders make up to about twenty, and each takes as long to decode as a whole picture."""
MAX_SEGMENTS = 10_000
END = b"\xff\xd9"
_START = b"\xff\xd8"
# Within coded data this skips stuffed bytes (ff 00) and restart markers (ff d0 to d7).
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])", re.DOTALL)
_EOI, _SOS = 0xD9, 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # markers that no length follows
# The application segments that Pillow reads: how each begins, and the fewest bytes that Pillow does not fail on.
_KEPT_APPS: Mapping[int, tuple[tuple[bytes, int], ...]] = {
    0xE0: ((b"JFIF\0", 14),),
    0xE1: ((b"Exif\0\0", 6), (b"http://ns.adobe.com/xap/1.0/\0", 29)),
    0xE2: ((b"ICC_PROFILE\0", 15),),
    0xEE: ((b"Adobe", 12),),
}


@dataclass
class Jpeg:
    """What a JPEG's markers say.

    header: everything before the pixels, without needless metadata; data: the file with that header; scans: their
    number; ended: whether the end marker is there.
    """

    data: bytes
    header: bytes = b""
    scans: int = 0
    ended: bool = False
    bits: dict[int, list[int]] = field(default_factory=dict, repr=False)
    """For each component's 64 coefficients, the lowest bit seen so far; 99 before any scan has one."""

    @property
    def whole(self) -> bool:
        """Whether the scans hold every bit of every coefficient of every component."""
        return bool(self.bits) and not any(low for lows in self.bits.values() for low in lows)

    def take_frame(self, body: bytes) -> None:
        """Note the components that a frame header lists."""
        self.bits = {body[at]: [99] * 64 for at in range(6, len(body) - 2, 3)}

    def take_scan(self, body: bytes) -> None:
        """Note which coefficients of which components a scan holds; progressive files split them by bits too."""
        self.scans += 1
        if not body or len(body) < 4 + 2 * body[0]:
            return
        first, last, low = body[-3], min(body[-2], 63), body[-1] & 15
        for at in range(body[0]):
            for coefficient in range(first, last + 1):
                if (component := self.bits.get(body[1 + 2 * at])) is not None:
                    component[coefficient] = low


def read_jpeg(data: bytes, name: str, *, pixels: bool = True) -> Jpeg:
    """Walk through a JPEG's markers; InvalidImage if it has more scans or segments than MAX_SCANS and MAX_SEGMENTS.

    pixels: whether the caller will decode `data`; stripping its metadata takes a copy.
    """
    found, kept, first_scan = Jpeg(data), [_START], 0
    for number, (marker, start, end) in enumerate(_segments(data)):
        if number >= MAX_SEGMENTS:
            raise InvalidImage("image", f"{name} has more than {MAX_SEGMENTS} JPEG segments; save it anew")
        body = data[start + 4 : end]
        if marker == _SOS:
            if not first_scan:
                first_scan, found.header = start, b"".join([*kept, data[start:end]])
            found.take_scan(body)
            if found.scans > MAX_SCANS:
                raise InvalidImage(
                    "image",
                    f"{name} is a progressive JPEG of more than {MAX_SCANS} scans, the most that are decoded; "
                    "save it anew, as a baseline JPEG or a PNG",
                )
        elif marker == _EOI:
            found.ended = True
        elif not first_scan and _is_needed(marker, body):
            kept.append(data[start:end])
        if marker in _FRAMES:
            found.take_frame(body)
    if pixels and first_scan and sum(map(len, kept)) != first_scan:
        found.data = b"".join([*kept, memoryview(data)[first_scan:]])
    return found


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end of its segment) up to the end of the image; coded data lies between the segments."""
    at = 2
    while (match := _MARKER.search(data, at)) is not None:
        marker, start = match[1][0], match.end() - 2
        end = (
            match.end()
            if marker in _ALONE or marker == _EOI
            else start + 2 + int.from_bytes(data[start + 2 : start + 4])
        )
        yield marker, start, end
        if marker == _EOI:
            return
        at = end


def _is_needed(marker: int, body: bytes) -> bool:
    """Whether decoding needs a segment before the first scan; comments and most application segments are dropped."""
    if 0xE0 <= marker <= 0xEF:
        kept = _KEPT_APPS.get(marker, ())
        return any(body.startswith(begins) and len(body) >= least for begins, least in kept)
    return marker != 0xFE  # a comment
