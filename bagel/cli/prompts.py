"""The prompts of a command line, each with the place it came from: --prompts, and the lines of a file or of stdin."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagel.errors import InvalidRequest
from bagel.request import MAX_TEXT_BYTES
from bagel.text_files import decode_marked, mark_of

MAX_PROMPT_FILE_BYTES = 16 * 2**20
STDIN = "-"
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_ALLOWED = "\t\r\n"
_NO_CONTROLS = bytes(range(32, 256)) + _ALLOWED.encode()
_CONTROLS = bytes(byte for byte in range(32) if byte not in _ALLOWED.encode())
_WIDE_PRINTABLE = 0.75
"""Share of printable ASCII up to which bytes may be a text of two or four bytes a character."""
_LETTERS = 0.6
"""Share of ASCII above which bytes that are no UTF-8 are a western text with some accents."""


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt, and where it was given, for messages."""

    text: str
    where: str


def read_prompts(prompts: Sequence[str] | None, file: str | None) -> list[GivenPrompt]:
    """The prompts of the command line, then those of the file; InvalidRequest if there is none or one is wrong.

    All are checked before any is returned.
    """
    found = [GivenPrompt(text, f"--prompts, number {i}") for i, text in enumerate(prompts or (), 1)]
    for prompt in found:
        check_text("--prompts", prompt.text)
    if file is not None:
        found += _prompts_of(file)
    if not found:
        raise InvalidRequest("prompt", "there is no prompt; give --prompts 'a large red circle', or --txt-prompts FILE")
    for prompt in found:
        if (size := len(prompt.text.encode())) > MAX_TEXT_BYTES:
            raise InvalidRequest("prompt", f"{prompt.where}: has {size} bytes of text; it may have {MAX_TEXT_BYTES}")
    return found


def check_text(flag: str, text: str) -> None:
    """Refuse a text of a flag that is blank, no Unicode, or that holds control characters."""
    if not text.strip():
        raise InvalidRequest("prompt", f"{flag} has an empty text; write what is wanted, like 'a large red circle'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", f"{flag} {text!a:.80} is not UTF-8; convert it") from None
    if (bad := _control_character(text)) is not None:
        raise InvalidRequest("prompt", f"{flag} {text!a:.80} holds {_named(text[bad])}; take it out")


def _prompts_of(file: str) -> list[GivenPrompt]:
    """The lines of a prompt file that are not blank, without the space around them."""
    source = "stdin" if file == STDIN else repr(file)
    text = _decoded(_read(file), source)
    # Not splitlines, which also splits at U+2028 and the like.
    lines = list(enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1))
    for number, line in lines:
        if (bad := _control_character(line)) is not None:
            found = f"line {number} of {source} holds {_named(line[bad])}"
            raise InvalidRequest("prompt", f"{found}; prompts are plain text, take it out")
    prompts = [GivenPrompt(line.strip(), f"line {number} of {source}") for number, line in lines if line.strip()]
    if not prompts:
        raise InvalidRequest("prompt", f"--txt-prompts {source} has no prompt; write one a line")
    return prompts


def _read(file: str) -> bytes:
    try:
        if file == STDIN:
            # One byte beyond the limit shows that there is too much, without reading all of it.
            data = sys.stdin.buffer.read(MAX_PROMPT_FILE_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:  # not only of regular files: <(...) of a shell is a pipe
                data = stream.read(MAX_PROMPT_FILE_BYTES + 1)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: there is no stdin
        reason = error.strerror if isinstance(error, OSError) else "it is no file that can be read"
        raise InvalidRequest("prompt", f"--txt-prompts {file!r} cannot be read: {reason}") from None
    if len(data) > MAX_PROMPT_FILE_BYTES:
        raise InvalidRequest("prompt", f"--txt-prompts {file!r} has more than {MAX_PROMPT_FILE_BYTES} bytes; split it")
    return data


def _decoded(data: bytes, source: str) -> str:
    """A file's text: UTF-8, or what its byte-order mark says; InvalidRequest naming what it seems to be instead."""
    mark, encoding = mark_of(data)
    found = f"--txt-prompts {source}"
    # Looked at before decoding: ASCII in two bytes a character is also UTF-8, full of NULs.
    if not mark and (wide := _unmarked(data)):
        raise InvalidRequest(
            "prompt",
            f"{found} seems to be {wide.upper()} without a byte-order mark; convert it to UTF-8, or save it with one",
        )
    try:
        return decode_marked(data)
    except UnicodeDecodeError as error:
        if mark:
            found = f"{found} begins as {encoding.upper()} does, but is damaged: {error.reason}"
            raise InvalidRequest("prompt", f"{found}; save it as UTF-8") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequest(
            "prompt", f"{found} is not UTF-8 in line {line} (byte 0x{data[error.start]:02x}); {_guess(data)}"
        ) from None


def _unmarked(data: bytes) -> str | None:
    """The encoding of two or four bytes a character that a file without a mark seems to be in; None for UTF-8.

    Such a file holds control characters for UTF-8, about half of its bytes are none of ASCII's, and it reads cleanly.
    """
    printable = len(data.translate(None, _CONTROLS + bytes(range(128, 256))))
    if not data.translate(None, _NO_CONTROLS) or printable > _WIDE_PRINTABLE * len(data) or _holds_utf8(data):
        return None
    for encoding in _WIDE:
        width = 4 if "32" in encoding else 2
        try:
            text = data[: len(data) // width * width].decode(encoding)
        except UnicodeDecodeError:
            continue
        if text and all(map(_plausible, text)):
            return encoding
    return None


def _holds_utf8(data: bytes) -> bool:
    """Whether it is UTF-8 of more than ASCII, which other encodings are hardly ever by chance."""
    try:
        return not data.decode("utf-8").isascii()
    except UnicodeDecodeError:
        return False


def _plausible(character: str) -> bool:
    return character in _ALLOWED or unicodedata.category(character) not in ("Cc", "Cn", "Co", "Cs")


def _guess(data: bytes) -> str:
    plain = sum(byte < 128 for byte in data) / len(data)
    if plain > _LETTERS:
        return "it may be Latin-1 or Windows-1252; convert it, as iconv -f WINDOWS-1252 -t UTF-8 does"
    return "it is in another encoding, perhaps UTF-16 without a byte-order mark or a code page; convert it to UTF-8"


def _control_character(text: str) -> int | None:
    """The place of the first control character that no prompt is meant to hold."""
    found: Iterator[int] = (
        i for i, each in enumerate(text) if unicodedata.category(each) == "Cc" and each not in _ALLOWED
    )
    return next(found, None)


def _named(character: str) -> str:
    names = {"\0": "a NUL character", "\x1b": "an escape character"}
    return names.get(character, f"the control character U+{ord(character):04X}")
