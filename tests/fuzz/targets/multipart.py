"""Multipart forms of callers: the first line is the Content-Type, the rest the body."""

from __future__ import annotations

from collections.abc import Iterable

from bagel.errors import InvalidRequest
from bagel_gateway.rest.forms import FormReader
from tests.fuzz.target import Target, check_message

TYPE = b"multipart/form-data; boundary=B"


def check(data: bytes) -> None:
    kind, _, body = data.partition(b"\n")
    content_type = kind.decode("latin-1")
    whole = outcome(content_type, [body])
    # However a network cuts the body, it is the same form.
    for size in (1, 7):
        assert outcome(content_type, [body[at : at + size] for at in range(0, len(body), size)]) == whole
    if isinstance(whole, str):
        raise InvalidRequest("body", whole)
    # An independent reading: sections between delimiters, each a head and a body.
    boundary = FormReader(content_type)._delimiter
    _, *sections = (b"\r\n" + body.lstrip(b"\r\n")).split(boundary)
    assert len(sections) == len(whole) + 1, "there are other parts than between the boundaries"
    for (_, _, content), section in zip(whole, sections, strict=False):
        assert section.partition(b"\r\n\r\n")[2] == content or not content, "a part has other bytes"


def outcome(content_type: str, pieces: list[bytes]) -> list[tuple[str, str | None, bytes]] | str:
    """The parts, or "refused"."""
    try:
        reader = FormReader(content_type)
        for piece in pieces:
            reader.feed(piece)
        parts = reader.end()
        for part in parts:
            part.text() if part.filename is None else None
        return [(part.name, part.filename, bytes(part.data)) for part in parts]
    except InvalidRequest as error:
        check_message(error)
        return "refused"


def part(head: bytes, content: bytes) -> bytes:
    return b"--B\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + content + b"\r\n"


def seeds() -> Iterable[bytes]:
    field = part(b'name="prompt"', b"a red cube")
    file = part(b'name="image"; filename="a.png"\r\nContent-Type: image/png', b"\x89PNG")
    coded = part(b"name=x; filename*=UTF-8''%e2%82%ac", b"")
    latin = part(b'name="p"\r\nContent-Type: text/plain; charset=utf-8', b"\xc3\xa4")
    yield TYPE + b"\n" + field + b"--B--\r\n"
    yield TYPE + b"\n" + field + file + b"--B--"
    yield TYPE + b"\n\r\n" + coded + latin + b"--B--\r\n"
    yield b'multipart/form-data; boundary="B"\n' + file + b"--B--\r\nafter"


WORDS = b'--B --B-- Content-Disposition: form-data ;name="p" ;filename="f" ;filename*= charset= boundary='

TARGET = Target(check, (InvalidRequest,), seeds, words=(*WORDS.split(), b"\r\n", b"\r\n\r\n"))
