"""Pages of K/V, as a peer sends them."""

from __future__ import annotations

from collections.abc import Iterable

from bagel.errors import IncompleteContext
from bagel.kv.codec import DTYPES, decode_page, encode_page, encode_waiting
from bagel.kv.pages import PageKey
from bagel.v1 import kv_pb2
from tests.fuzz.target import Target

NAMES = {int(number): name for name, number in DTYPES.items()}


def check(data: bytes) -> None:
    page = decode_page(data)
    told = kv_pb2.PullResponse.FromString(data)
    if page is None:
        assert told.HasField("waiting") and told.SerializeToString() == data
        return
    assert page.key == (told.digest, told.layer, told.token_begin) and page.payload == told.payload
    assert (page.token_end, *page.heads) == (told.token_end, told.head_begin, told.head_end)
    assert (page.head_dim, page.dtype, page.checksum) == (told.head_dim, told.dtype, told.checksum)
    # One form on the wire: what passes for intact is what would have been sent.
    if page.found_checksum() == page.checksum and page.dtype in NAMES:
        facts = page.token_end, page.heads, page.head_dim, NAMES[page.dtype]
        assert encode_page(page.key, *facts, (page.payload,)) == data


def seeds() -> Iterable[bytes]:
    yield encode_page(PageKey(b"d" * 16, 3, 64), 66, (0, 2), 4, "bfloat16", (b"k" * 32, b"v" * 32))
    yield encode_page(PageKey(b"", 0, 0), 0, (0, 0), 0, "float32", ())
    yield encode_waiting(0)
    yield encode_waiting(300)


TARGET = Target(check, (IncompleteContext,), seeds, words=(b"\x7a", b"\x7a\x80\x01", b"\x82\x01\x00", b"\x0a\x10"))
