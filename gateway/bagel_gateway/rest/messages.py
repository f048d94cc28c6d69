"""Messages of a chat as the parts of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bagel.errors import InvalidRequest, together
from bagel.v1 import common_pb2
from bagel.vocabulary import PART_INSTEAD, control_mark_problems
from bagel_gateway.rest.data_urls import data_of
from bagel_gateway.rest.fetch import Fetcher
from bagel_gateway.rest.serve import check_images, image_part, text_part

ROLES = ("system", "developer", "user", "assistant")
FIELD = "messages"
NOT_BLANK = r"\S"


def _object(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*required], "additionalProperties": False, "properties": properties}


_WORDS = {"type": "string", "pattern": NOT_BLANK}
_TEXT = _object(("type", "text"), type={"const": "text"}, text=_WORDS)
_URL = _object(("url",), url={"type": "string"}, detail={"enum": ["auto", None]})
_IMAGE = _object(("type", "image_url"), type={"const": "image_url"}, index={"type": "integer"}, image_url=_URL)
_PARTS = {"type": "array", "items": {"oneOf": [_TEXT, _IMAGE]}}
_CONTENT = {"anyOf": [_WORDS, _PARTS]}
MESSAGE: Mapping[str, Any] = {
    "oneOf": [
        _object(("role", "content"), role={"enum": [role for role in ROLES if role != "assistant"]}, content=_CONTENT),
        _object(
            ("role",),
            role={"const": "assistant"},
            content={"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
            images=_PARTS,
        ),
    ]
}
"""One message, for the OpenAPI document."""


async def parts_of(
    messages: Sequence[Mapping[str, Any]], fetcher: Fetcher, max_images: int, *, interleave: bool = False
) -> list[common_pb2.Part]:
    """Each text and image; roles are checked, not rendered. Raises InvalidRequest for anything else.

    A user's message has its images before its texts, as the model was made for; interleave: in the order given.
    """
    reading = _Reading(interleave)
    if problems := reading.problems(messages):
        raise together(problems)
    check_images(sum("url" in content for content in reading.contents), FIELD, max_images)
    parts = []
    for content in reading.contents:
        if "url" in content:
            try:
                parts.append(image_part(await image_at(content["url"], fetcher)))
            except InvalidRequest as error:
                # The same class, so that the status stays the same.
                raise type(error)(error.field, f"{content['where']}: {error}") from None
        else:
            parts.append(text_part(content["text"]))
    return parts


def problems_of(messages: object) -> list[InvalidRequest]:
    """All that is wrong with the messages of a body that is refused anyway."""
    several = messages if isinstance(messages, list) else []
    return _Reading(interleave=True).problems([each for each in several if isinstance(each, dict)])


class _Reading:
    """Messages' texts and URLs of images, and all that is wrong with them."""

    def __init__(self, interleave: bool) -> None:
        self._interleave = interleave
        self.contents: list[dict[str, str]] = []
        self._problems: list[InvalidRequest] = []

    def problems(self, messages: Sequence[Mapping[str, Any]]) -> list[InvalidRequest]:
        """Take messages in; what was wrong with them."""
        for number, message in enumerate(messages):
            self.message(f"{FIELD}[{number}]", message)
        return self._problems

    def message(self, where: str, message: Mapping[str, Any]) -> None:
        """Take one in. Answers of ours are read as they were given."""
        role = message.get("role")
        if role not in ROLES:
            self._wrong(f"{where}.role is {role!r:.80}; it must be one of {', '.join(ROLES)}")
        known = {"role", "content"} | ({"images"} if role == "assistant" else set())
        for key, value in message.items():
            if key not in known and value not in (None, [], ""):
                self._wrong(f"{where}.{key:.200} is not supported; leave it out")
        before = len(self.contents)
        for key in ("content", "images"):
            value = message.get(key)
            if isinstance(value, str):
                if value or role != "assistant":
                    self._take(_text, f"{where}.{key}", value)
            elif isinstance(value, list):
                for at, part in enumerate(value):
                    self._take(_content, f"{where}.{key}[{at}]", part)
            elif value is not None or (key == "content" and role != "assistant"):
                self._wrong(f"{where}.{key} is {value!r:.80}; it must be a text or a list of parts")
        if role == "user" and not self._interleave:
            # The sort is stable: images keep their order, and texts theirs.
            self.contents[before:] = sorted(self.contents[before:], key=lambda content: "url" not in content)

    def _take(self, read: Callable[[str, Any], dict[str, str]], where: str, given: object) -> None:
        try:
            self.contents.append(read(where, given))
        except InvalidRequest as error:
            self._problems.append(error)

    def _wrong(self, message: str) -> None:
        self._problems.append(_wrong(message))


def _content(where: str, part: object) -> dict[str, str]:
    if not isinstance(part, dict):
        raise _wrong(f"{where} is {part!r:.80}; it must be an object with a type")
    kind, value = part.get("type"), None
    known = {"text": {"type", "text"}, "image_url": {"type", "image_url", "index"}}.get(str(kind))
    if known is None:
        word = str(kind) if kind is not None else next((key for key in part if key in PART_INSTEAD), "")
        instead = f"write {PART_INSTEAD[word]}" if word in PART_INSTEAD else "it must be text or image_url"
        raise _wrong(f"{where}.type is {kind!r:.80}; {instead}")
    if extra := set(part) - known:
        raise _wrong(f"{where}.{min(map(str, extra)):.200} is not supported; leave it out")
    if kind == "text":
        value = part.get("text")
    elif isinstance(part.get("image_url"), dict):
        image = part["image_url"]
        value = image.get("url")
        if image.get("detail") not in (None, "auto") or set(image) - {"url", "detail"}:
            raise _wrong(f"{where}.image_url may have a url alone, and detail auto: the model sees every image alike")
    if not isinstance(value, str):
        instead = f"write {PART_INSTEAD['input_text' if kind == 'text' else 'image']}"
        raise _wrong(f"{where} has no {'text' if kind == 'text' else 'image_url.url'}; {instead}")
    return _text(where, value) if kind == "text" else {"url": value, "where": where}


def _text(where: str, text: str) -> dict[str, str]:
    if not text.strip():
        raise _wrong(f"{where} is an empty text; write what is wanted, or leave it out")
    if marked := control_mark_problems(FIELD, [text], where):
        raise together(marked)
    return {"text": text}


async def image_at(url: str, fetcher: Fetcher) -> bytes:
    """The file of an image, in a data URL or at an https one."""
    url = url.strip()  # as browsers do
    if url[:5].lower() != "data:":
        return await fetcher.fetch(url)
    return data_of(url, FIELD)


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(FIELD, message)
