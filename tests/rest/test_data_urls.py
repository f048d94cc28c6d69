"""Data URLs as browsers, mail programs and scripts write them: read, or refused with the fault named."""

from __future__ import annotations

import asyncio
import base64
from urllib.parse import quote

import pytest

from bagel.errors import InvalidImage
from bagel_gateway.rest.data_urls import data_of
from bagel_gateway.rest.fetch import Fetcher
from bagel_gateway.rest.messages import parts_of

FILE = bytes(range(256)) + b"?>~"
CODE = base64.b64encode(FILE).decode()
URL_SAFE = base64.urlsafe_b64encode(FILE).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{CODE}",
        f"DATA:IMAGE/PNG;BASE64,{CODE}",
        f"data:;base64,{CODE}",
        f"data:image/png;name=a b.png;charset=utf-8;base64,{CODE}",
        f"data:image/png; base64 , {CODE}",
        f"data:image/png;base64;name=x,{CODE}",
        "data:image/png;base64," + base64.encodebytes(FILE).decode(),
        "data:image/png;base64," + CODE.replace("A", "A\r\n \t"),
        f"data:image/png;base64,{CODE.rstrip('=')}",
        f"data:image/png;base64,{URL_SAFE}",
        f"data:image/png;base64,{URL_SAFE.rstrip('=')}",
        f"data:image/png;base64,{quote(CODE, safe='')}",
        f"data:image/png,{quote(FILE)}",
        f"data:,{quote(FILE)}",
    ],
)
def test_read(url: str) -> None:
    assert data_of(url, "messages") == FILE


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64," + CODE[:-3] + "*==", r"'\*' in its data"),
        ("data:image/png;base64,\u2026", "character 1 of its data"),
        ("data:image/png;base64,AAAAA", "5 characters of base64, which no file has: it was cut off"),
        ("data:image/png;base64,", "no data after its comma"),
        ("data:image/png,", "no data after its comma"),
        ("data:" + "x" * 2000 + ",", "no comma"),
        (f"data:image/png,{CODE}", "does not say that its data are base64"),
        (f"data:base64,{URL_SAFE}\n", "does not say that its data are base64"),
        (f'data:image/png;name="a,b.png"; BASE64,{CODE}', "write %2C"),
    ],
)
def test_refused(url: str, fault: str) -> None:
    with pytest.raises(InvalidImage, match=fault) as refused:
        data_of(url, "messages")
    assert refused.value.field == "messages"


def test_white_space_around_a_url_is_none_of_it() -> None:
    content = [{"type": "image_url", "image_url": {"url": f"\n data:image/png;base64,{CODE} \n"}}]
    parts = asyncio.run(parts_of([{"role": "user", "content": content}], Fetcher((), 0), 1))
    assert parts[0].image.data == FILE
