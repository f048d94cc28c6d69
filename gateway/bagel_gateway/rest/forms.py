"""Multipart forms, read as they come: bounded in parts and headers, whole, and UTF-8."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from bagel.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 64
MAX_FILES = 8
"""Some more than are served, so that too many are refused by their own message."""
MAX_PARTS = MAX_FIELDS + MAX_FILES
LONGEST_NAME = 200
MAX_FIELD_BYTES = 2 * 2**20
_CODED_NAME = re.compile(rb";\s*filename\*\s*=\s*[\w-]*'[\w-]*'([^;\s]*)", re.IGNORECASE)
"""How older clients write the name of a file that is not ASCII (RFC 5987)."""
_PLAIN = ("", "7bit", "8bit", "binary")


@dataclass
class Part:
    """One part of a form. filename: of a file, None of a value."""

    name: str = ""
    filename: str | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)

    def text(self) -> str:
        """A value; raises InvalidRequest, naming it, if it is not UTF-8."""
        _, options = parse_options_header(self.headers.get(b"content-type", b""))
        charset = options.get(b"charset", b"utf-8").decode("latin-1")
        try:
            known = codecs.lookup(charset).name in ("utf-8", "ascii")
        except (LookupError, ValueError):  # the latter for a name with a NUL in it
            known = False
        if not known:
            raise InvalidRequest(self.name, f"{self.name} is said to be {charset!r:.80}; send the form's text as UTF-8")
        try:
            return self.data.decode()
        except UnicodeDecodeError as error:
            wrong = f"byte {error.start} is 0x{self.data[error.start]:02x}"
            raise InvalidRequest(
                self.name, f"{self.name} is not UTF-8: {wrong}; send the form's text as UTF-8"
            ) from None


class FormReader:
    """Takes a form piece by piece; every method raises InvalidRequest for what is none, or more than is read."""

    def __init__(self, content_type: str) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise InvalidRequest("body", "the form's Content-Type names no boundary; multipart/form-data; boundary=...")
        self._delimiter = b"\r\n--" + boundary
        self._delimiters, self._begun, self._ended = 0, False, False
        self._edge = b""
        self.parts: list[Part] = []
        self._part, self._name, self._value = Part(), bytearray(), bytearray()
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _unreadable(error) from None

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        # A line that begins like the boundary ends a part (RFC 2046). The parser also looks at those that go on
        # otherwise, each for microseconds, so that a body of them would take it many seconds.
        # The first one of a form is none of these, whatever line ends come before it. They are left out, as the parser
        # takes them, and what follows them, in another way if they come in a piece of their own.
        piece = piece if self._begun else piece.lstrip(b"\r\n")
        self._begun = self._begun or bool(piece)
        self._count(piece)
        if self._delimiters > MAX_PARTS + 1:
            raise InvalidRequest("body", f"the form has more than {MAX_PARTS} parts, the most that is read")
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _unreadable(error) from None

    def _count(self, piece: bytes) -> None:
        """Count the boundary in a piece, and where it lies across the last piece's end: a network cuts anywhere."""
        short = len(self._delimiter) - 1
        across = self._edge + piece[:short]
        self._delimiters += across.count(self._delimiter) + piece.count(self._delimiter)
        self._edge = (self._edge + piece[-short:])[-short:]

    def end(self) -> list[Part]:
        """All parts, once everything has been taken."""
        if not self._ended:
            raise InvalidRequest(
                "body", "the form ends before its closing boundary, so that some of it may be lost; send all of it"
            )
        if self._delimiters > len(self.parts):
            problem = "the form's boundary comes again in its data or after its end"
            raise InvalidRequest("body", f"{problem}; send one form, with a boundary that is nowhere in it")
        return self.parts

    def _begin(self) -> None:
        self._part = Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._part.headers[bytes(self._name.lower())] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        part = self._part
        disposition = part.headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        part.name = _name(options)
        if (filename := options.get(b"filename")) is not None:
            part.filename = filename.decode("utf-8", "replace")
        elif (coded := _CODED_NAME.search(disposition)) is not None:
            part.filename = unquote(coded[1].decode("latin-1"))
        encoding = part.headers.get(b"content-transfer-encoding", b"").decode("latin-1").strip().lower()
        if encoding not in _PLAIN:
            raise InvalidRequest(part.name, f"{part.name} comes in the encoding {encoding!r:.80}; send it as it is")
        files = sum(each.filename is not None for each in self.parts) + (part.filename is not None)
        for kind, count, most in (
            ("files", files, MAX_FILES),
            ("fields", len(self.parts) + 1 - files, MAX_FIELDS),
        ):
            if count > most:
                raise InvalidRequest("body", f"the form has more than {most} {kind}, the most that is read")

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.filename is None and len(part.data) + end - start > MAX_FIELD_BYTES:
            raise InvalidRequest(part.name, f"{part.name} has more than {MAX_FIELD_BYTES} bytes, the most of a field")
        # A view, since a slice of bytes would be one more copy.
        part.data += memoryview(data)[start:end]

    def _part_end(self) -> None:
        self.parts.append(self._part)

    def _end(self) -> None:
        self._ended = True


def _name(options: Mapping[bytes, bytes]) -> str:
    if b"name" not in options:
        raise InvalidRequest("body", "a part of the form has no name; give it one in its Content-Disposition")
    try:
        name = options[b"name"].decode()
    except UnicodeDecodeError:
        name = options[b"name"].decode("utf-8", "backslashreplace")
        raise InvalidRequest("body", f"the form's field {name!r:.80} has a name that is not UTF-8") from None
    if len(name) > LONGEST_NAME or not name.isprintable():
        # Messages and logs say it, in one line.
        problem = f"the form's field {name!r:.80} has a name of {len(name)} characters"
        raise InvalidRequest("body", f"{problem}; it must be printable, of at most {LONGEST_NAME}")
    return name


def _unreadable(error: FormParserError) -> InvalidRequest:
    return InvalidRequest("body", f"the form cannot be read: {str(error)[:200]}")
