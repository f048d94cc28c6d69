"""What a client may send over HTTP: lengths, JSON, forms; each refused as soon as it is too much."""

from __future__ import annotations

import asyncio
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from bagel.errors import InvalidRequest
from bagel_gateway.rest.forms import MAX_FIELDS, FormReader
from bagel_gateway.rest.structure import Structure
from tests.gateway_stages import Deployment
from tests.rest.test_front import CHAT, IMAGES, photo, post, raw, through

EDITS = "/v1/images/edits"
FORM = "multipart/form-data; boundary=the-boundary"
LIMIT = 65_536


def head(path: str, *headers: str, kind: str = "application/json") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


async def sent_until_answered(at: Deployment, start: bytes, piece: bytes, most: int) -> tuple[int, bytes]:
    """How many bytes of a body were taken before the answer came, and the answer."""
    assert at.gateway.rest is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", at.gateway.rest.port)
    answering = asyncio.create_task(reader.read(2000))
    sent = 0
    try:
        writer.write(start)
        while sent < most and not answering.done():
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    answer = await answering
    writer.close()
    return sent, answer


@pytest.mark.parametrize("length", ["9" * 20, "9" * 19, "0" * 12 + "99999999", "00000000000000100000"])
def test_no_length_however_written_switches_the_limit_off(length: str) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        start = head(IMAGES, f"Content-Length: {length}")
        sent, answer = await sent_until_answered(at, start, b" " * LIMIT, 100 * LIMIT)
        assert answer.startswith(b"HTTP/1.1 413 "), answer
        assert sent < 100 * LIMIT

    through(work, max_body_bytes=LIMIT)


def test_a_length_that_is_none_or_one_of_two_is_refused() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        for length in (
            "-1",
            "+5",
            "1_000",
            "0x10",
            "\u0661\u0660",
            "5 5",
            "5, 6",
            "5\r\nContent-Length: 6",
            "",
            "9" * 21,
        ):
            status, _ = await raw(at, head(IMAGES, f"Content-Length: {length}") + b"{}   ")
            assert status == 400, length
        both = head(IMAGES, "Content-Length: 2", "Transfer-Encoding: chunked")
        status, answer = await raw(at, both + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 8)
        assert status == 413, answer
        assert (await client.images.generate(prompt="a cat")).data

    through(work, max_body_bytes=LIMIT)


def test_a_body_in_very_many_small_chunks_is_refused_early() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        start = head(CHAT, "Transfer-Encoding: chunked")
        sent, answer = await sent_until_answered(at, start, b"1\r\n \r\n" * 1000, 10_000_000)
        assert answer.startswith(b"HTTP/1.1 400 ") and sent < 10_000_000, answer
        body = json.dumps({"prompt": "x" * 2000}).encode()
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body[:500]) + b"%x\r\n" % (len(body) - 500) + body[500:]
        assert (await raw(at, head(IMAGES, "Transfer-Encoding: chunked") + chunks + b"\r\n0\r\n\r\n"))[0] == 200

    through(work)


def test_a_body_where_no_image_can_be_is_small() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        status, answer = await post(at, IMAGES, {"prompt": "x", "user": "y" * LIMIT})
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        assert f"{LIMIT} bytes are the most" in answer["error"]["message"]
        words = [{"role": "user", "content": "x" * LIMIT}]
        assert (await post(at, CHAT, {"model": "tiny", "messages": words}))[0] == 200

    through(work, max_text_body_bytes=LIMIT)


BOMBS = [
    (b'{"messages": [' + b"{}," * 100_000 + b"{}]}", "more than 10000 JSON values"),
    (b'{"messages": ' + b"[" * 65 + b"]" * 65 + b"}", "more than 64 objects and lists"),
    (b'{"messages": "' + b"\\n" * 3000 + b'"}', "more than 2048 escapes"),
    (b'{"messages": ' + b'""' * 30_000 + b"}", "more than 10000 JSON values"),
    (('{"messages": "' + "x" * 40_000 + '"}').encode("utf-16"), "not UTF-8"),
]


@pytest.mark.parametrize(("body", "said"), BOMBS)
def test_the_structure_of_a_body_is_bounded_before_it_is_parsed(body: bytes, said: str) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        status, answer = await post(at, CHAT, body)
        assert status == 400 and said in answer["error"]["message"], answer

    through(work, max_text_body_bytes=2048)


def test_a_large_body_of_wide_characters_is_refused_before_it_is_four_times_as_large() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        body = ('{"messages": "' + "x" * 400_000 + '\U0001f600"}').encode()
        status, answer = await post(at, CHAT, body)
        assert status == 400 and "not ASCII" in answer["error"]["message"], answer

    through(work, max_body_bytes=500_000)


@given(st.text('[]{},:"\\a é', max_size=60), st.randoms(use_true_random=False))
def test_structure_is_counted_the_same_however_a_body_is_cut(text: str, random: random.Random) -> None:
    data, cut = text.encode(), Structure(99, 99, 99)
    whole = Structure(99, 99, 99)
    whole.feed(data)
    at = 0
    while at < len(data):
        end = at + random.randint(1, 9)
        cut.feed(data[at:end])
        at = end
    assert vars(cut) == vars(whole)


@given(st.recursive(st.none() | st.text(max_size=9), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_is_no_larger_than_the_limit_is_read(value: object) -> None:
    def count(value: object) -> tuple[int, int]:
        if not isinstance(value, list | dict):
            return 1, 0
        inner = [count(each) for each in (value.values() if isinstance(value, dict) else value)]
        return 1 + sum(values for values, _ in inner), 1 + max((depth for _, depth in inner), default=0)

    values, depth = count(value)
    data = json.dumps(value, ensure_ascii=False).encode()
    Structure(2 * values, depth, len(data)).feed(data)
    if depth:
        with pytest.raises(InvalidRequest, match="within each other"):
            Structure(10**6, depth - 1, len(data)).feed(data)


# Forms


def part(name: str, data: bytes, more: str = "") -> bytes:
    return f'--the-boundary\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


def edit(*parts: bytes) -> bytes:
    image = part("image", photo(), '; filename="a.png"')
    return b"".join((image, part("prompt", "grün".encode()), *parts)) + b"--the-boundary--\r\n"


def test_a_form_that_is_cut_off_anywhere_is_refused_and_a_whole_one_is_drawn() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        whole = edit(part("seed", b"7"))
        for end in (0, 5, 60, len(whole) - 40, len(whole) - 20, len(whole) - 6, len(whole) - 3):
            status, answer = await post(at, EDITS, whole[:end], FORM)
            assert status == 400, (end, answer)
            assert "closing boundary" in answer["error"]["message"] and at.dits[0].asked == [], (end, answer)
        for end in (len(whole), len(whole) - 2):
            assert (await post(at, EDITS, whole[:end], FORM))[0] == 200
        assert (await post(at, EDITS, b"\r\n" + whole + b"an epilogue", FORM))[0] == 200
        assert [call.draw.seed for call in at.dits[0].asked] == [7, 7, 7]

    through(work)


WRONG_FORMS = [
    (part("seed", "5é".encode("latin-1")), "seed", "byte 1 is 0xe9"),
    (part("negative_prompt", b"\xff\xfea\x00"), "negative_prompt", "not UTF-8"),
    (part("n", "1".encode("utf-16"), "\r\nContent-Type: text/plain; charset=utf-16"), "n", "'utf-16'"),
    (part("seed", b"NQ==", "\r\nContent-Transfer-Encoding: base64"), "seed", "'base64'"),
    (part("stop_token_ids", b"[" + b"{}," * 20_000 + b"{}]"), "stop_token_ids", "JSON values"),
    (part("x" * 5000, b"1"), "body", "[Mm]aximum header size"),
    (part("seed", b"1", "\r\na: b" * 20), "body", "[Mm]aximum header count"),
    (b"".join(part(f"f{i}", b"") for i in range(MAX_FIELDS)), "body", "more than 64 fields"),
    (part("image", photo(), '; filename="a"') * 8, "body", "more than 8 files"),
    (b"--the-boundary--\r\n" + part("seed", b"7"), "body", "comes again"),
    (b"--the-boundary\r\nContent-Disposition: form-data\r\n\r\n\r\n", "body", "no name"),
]


@pytest.mark.parametrize(("more", "param", "said"), WRONG_FORMS, ids=[param for _, param, _ in WRONG_FORMS])
def test_a_form_that_is_odd_is_refused_by_what_is_wrong(more: bytes, param: str, said: str) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        status, answer = await post(at, EDITS, edit(more), FORM)
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert re.search(said, answer["error"]["message"]), answer

    through(work)


def test_a_form_full_of_what_nearly_is_its_boundary_is_refused_early() -> None:
    reader = FormReader(FORM)
    with pytest.raises(InvalidRequest, match="72 parts"):
        reader.feed(part("image", b"\r\n--the-boundaryx" * 100, '; filename="a"'))


# Who breaks off


def test_an_upload_that_breaks_off_is_its_clients_going(caplog: pytest.LogCaptureFixture) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        assert at.gateway.rest is not None
        for start in (head(CHAT, "Content-Length: 9000"), head(EDITS, "Transfer-Encoding: chunked", kind=FORM)):
            _, writer = await asyncio.open_connection("127.0.0.1", at.gateway.rest.port)
            writer.write(start + (b"{" if b"Length" in start else b"5\r\n--the\r\n"))
            await writer.drain()
            async with asyncio.timeout(10):
                while not at.gateway.rest.answering:
                    await asyncio.sleep(0.01)
                writer.transport.abort()
                while at.gateway.rest.answering:
                    await asyncio.sleep(0.01)
        assert 'code="499"' in at.gateway.metrics.text().decode()
        assert 'code="500"' not in at.gateway.metrics.text().decode()
        assert not [record for record in caplog.records if record.exc_info or record.levelname in ("WARNING", "ERROR")]

    through(work)


def test_errors_say_no_more_than_can_be_read() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        long = "k" * 2_000_000
        part = {"type": "text", "text": "a", long: 1}
        chats: list[dict[str, object]] = [
            {"role": "user", "content": "a", long: 1},
            {"role": "user", "content": [part]},
            {"role": long, "content": "a"},
        ]
        bodies: list[tuple[str, object]] = [
            (IMAGES, {long: 1}),
            (IMAGES, {"prompt": "a", "model": long}),
            (IMAGES, {"prompt": "a", "quality": long}),
            *((CHAT, {"messages": [chat]}) for chat in chats),
        ]
        for path, body in bodies:
            status, answer = await post(at, path, body)
            assert status in (400, 404) and len(json.dumps(answer)) < 5000

    through(work)


@pytest.mark.parametrize(
    ("coded", "name"),
    [
        ("filename*=utf-8''caf%C3%A9.png", "café.png"),
        ("FILENAME* = UTF-8'en'a%20b.png; x=y", "a b.png"),
        ("filename=\"a.png\"; filename*=utf-8''b.png", "a.png"),
    ],
)
def test_a_file_whose_name_is_coded_is_a_file(coded: str, name: str) -> None:
    reader = FormReader(FORM)
    head = f'--the-boundary\r\nContent-Disposition: form-data; name="image"; {coded}\r\n\r\n'
    reader.feed(head.encode() + b"bytes\r\n--the-boundary--\r\n")
    assert [(part.filename, bytes(part.data)) for part in reader.end()] == [(name, b"bytes")]
