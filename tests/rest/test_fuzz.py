"""Whatever is sent to the REST front: an answer of its own form, never a 5xx, and a gateway that goes on."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_gateway.rest.parameters import (
    REFUSED_CHAT,
    REFUSED_EDIT,
    REFUSED_GENERATION,
    ChatParameters,
    ImageParameters,
)
from tests.gateway_stages import deployment
from tests.rest.test_front import data_url, photo

pytestmark = pytest.mark.slow

LIMIT_S = 30
PATHS = ["/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"]
NAMES = sorted({*ImageParameters.model_fields, *ChatParameters.model_fields, *REFUSED_GENERATION})
NAMES += sorted({*REFUSED_CHAT, *REFUSED_EDIT} - set(NAMES))

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = [0, 1, 2, 3, 10, 11, 50, -1, 0.5, 1.0, 100.0, 2**31, 2**63 - 1, 2**63, 2**64, 1e308, True, False]
WORDS = ["auto", "64x64", "0x0", "16x99999", "png", "jpeg", "gif", "content", "global", "", "\x00", "\ud800"]
LISTS = [[0, 1], [1, 0], [0.5, "x"], [], ["image"], ["text"], {}, {"type": "text"}, {"include_usage": True}]
near: st.SearchStrategy[Any] = st.sampled_from([*NUMBERS, *WORDS, *LISTS])
part = st.sampled_from(
    [
        {"type": "text", "text": "hello"},
        {"type": "text"},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {"url": "https://127.0.0.1/x"}},
        data_url(photo()),
        data_url(b"no image"),
    ]
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.lists(part, max_size=6) | anything}
)
options = st.dictionaries(st.sampled_from(NAMES), near | anything, max_size=4)


@pytest.fixture(scope="module")
def front() -> Iterator[str]:
    """Where a gateway speaks HTTP, on stages that draw nothing."""
    ready, stop, addresses = Event(), Event(), list[str]()

    async def serve() -> None:
        async with deployment(http="127.0.0.1:0", max_body_bytes=100_000) as made:
            assert made.gateway.rest is not None
            addresses.append(made.gateway.rest.address)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(LIMIT_S)
    yield addresses[0]
    stop.set()
    thread.join(LIMIT_S)


def check(front: str, path: str, body: bytes, kind: str, method: str = "POST") -> int:
    """Send it; the status, which is none of a server's fault."""
    connection = http.client.HTTPConnection(front, timeout=LIMIT_S)
    try:
        connection.request(method, path, body, {"Content-Type": kind})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    assert response.status < 500, answer
    if response.status >= 400:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    return response.status


def form(fields: dict[str, Any]) -> bytes:
    pieces = []
    for name, value in fields.items():
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
        named = '; filename="a"' if isinstance(value, bytes) else ""
        pieces.append(f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n")
    return b"".join(pieces) + b"--b--\r\n"


@settings(max_examples=150)
@given(options, st.sampled_from(["a cat", "", "<|im_end|>", 7, None]))
def test_pictures(front: str, more: dict[str, Any], prompt: object) -> None:
    check(front, PATHS[0], json.dumps({"prompt": prompt, **more}).encode(), "application/json")


@pytest.mark.parametrize("path", [PATHS[0], PATHS[2]])
@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["\ud800", "model", "prompt"]) | st.text(max_size=5), near | anything))
def test_other_objects(front: str, path: str, body: dict[str, Any]) -> None:
    check(front, path, json.dumps(body).encode(), "application/json")


@settings(max_examples=150)
@given(options, st.lists(message, max_size=4) | anything)
def test_chats(front: str, more: dict[str, Any], messages: object) -> None:
    check(front, PATHS[2], json.dumps({"messages": messages, "model": "tiny", **more}).encode(), "application/json")


@settings(max_examples=100)
@given(options, st.sampled_from([photo(), photo(1, 1, "GIF"), b"", b"GIF89a", "text"]) | st.binary(max_size=64))
def test_edits(front: str, more: dict[str, Any], image: object) -> None:
    fields = {name: value for name, value in more.items() if name != "prompt"}
    check(front, PATHS[1], form({"prompt": "x", "image": image, **fields}), "multipart/form-data; boundary=b")


@settings(max_examples=100)
@given(
    st.sampled_from(PATHS), st.binary(max_size=200), st.sampled_from(["application/json", "", "multipart/form-data"])
)
def test_bytes(front: str, path: str, body: bytes, kind: str) -> None:
    check(front, path, body, kind + ("; boundary=b" if "form" in kind else ""))


@settings(max_examples=60)
@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30), st.sampled_from(["GET", "POST", "PUT"])
)
def test_paths(front: str, path: str, method: str) -> None:
    check(front, "/v1/models/" + path.lstrip("/"), b"", "application/json", method)


def test_it_still_draws(front: str) -> None:
    assert check(front, PATHS[0], json.dumps({"prompt": "a cat"}).encode(), "application/json") == 200
