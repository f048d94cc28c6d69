"""Damage of pages on their way: whatever happens to the bytes of a message, no wrong K/V is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import torch
from xxhash import xxh3_64

from bagel.errors import ForeignContext, IncompleteContext
from bagel.kv.codec import PAGE_VERSION, decode_page, encode_waiting
from bagel.kv.pages import KvLayout, PageKey
from bagel.kv.puller import KvPuller, _Wanted
from bagel.kv.service import KvBlocksServicer
from bagel.kv.store import KvStore
from bagel.v1 import kv_pb2
from tests.kv.pair import OURS, Pair, check, fails, fill, run

FINGERPRINT = b"fingerprint"
DTYPES = ("float32", "bfloat16", "float16")


class Puller:
    """Wants all pages of two segments, some of which are equal in length: a page can be taken for another one."""

    def __init__(self, dtype: str) -> None:
        self.layout = KvLayout(3, 2, 4, dtype, page_heads=2**14)
        self.segments = {b"a" * 16: self.layout.page_tokens + 2, b"b" * 16: 2}
        self._store = self.store()
        self._puller = KvPuller(self._store, {})
        self.wanted = _Wanted(
            {
                PageKey(digest, layer, begin): end
                for digest, length in self.segments.items()
                for begin, end in self.layout.page_ranges(length)
                for layer in range(self.layout.layers)
            }
        )
        self._ends = dict(self.wanted.ends)

    def store(self) -> KvStore:
        """A store with both segments reserved and claimed."""
        store = KvStore(self.layout, FINGERPRINT, 2**14)
        self.lease = store.lease(list(self.segments.items()), 600)
        assert all(store.claim(digest) for digest in self.segments)
        return store

    def messages(self) -> list[bytes]:
        """What a source sends of them."""
        store, generator = self.store(), torch.Generator().manual_seed(7)
        for digest, length in self.segments.items():
            for layer in range(self.layout.layers):
                k, v = torch.randn(2, length, 2, 4, generator=generator).to(getattr(torch, self.layout.dtype))
                store.write_layer(digest, layer, k, v)
        request = kv_pb2.PullRequest(
            digests=self.segments, fingerprint=FINGERPRINT, lease_id=self.lease, page_version=PAGE_VERSION
        )

        async def all_pages() -> list[bytes]:
            return [page async for page in KvBlocksServicer(store)._pages(request)]

        return asyncio.run(all_pages())

    def takes(self, data: bytes) -> bool:
        """Whether a message is stored as a page; the page is wanted again afterwards."""
        self._puller._accept(data, self.wanted)
        taken = self.wanted.ends != self._ends
        self.wanted.ends = dict(self._ends)
        return taken


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flip_of_one_bit_of_every_page_is_seen(dtype: str) -> None:
    puller = Puller(dtype)
    pages = puller.messages()
    assert len(pages) == len(puller.wanted.ends) == 9
    for page in pages:
        for bit in range(8 * len(page)):
            data = bytearray(page)
            data[bit // 8] ^= 1 << bit % 8
            assert not puller.takes(bytes(data)), f"bit {bit} of {page!r}"
        assert puller.wanted.causes
        assert puller.takes(page)


def varint_padded(page: bytes) -> bytes:
    """The layer, written with a byte more than it needs."""
    at = page.index(b"\x10\x02\x18", 18)
    return page[: at + 1] + b"\x82\x00" + page[at + 2 :]


def reordered(page: bytes) -> bytes:
    """The payload first: the same message for any parser."""
    message = kv_pb2.PullResponse.FromString(page)
    payload = kv_pb2.PullResponse(payload=message.payload).SerializeToString()
    message.ClearField("payload")
    return payload + message.SerializeToString()


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "an unknown field": lambda page: page[:18] + b"\x70\x01" + page[18:],
    "an unknown field at the end": lambda page: page + b"\x82\x01\x01x",
    "a field twice": lambda page: page[:18] + page[:18] + page[18:],
    "another value before a field": lambda page: b"\x10\x00" + page,
    "another value after the payload": lambda page: page + b"\x10\x00",
    "another payload before the payload": lambda page: page[:18] + b"\x7a\x01x" + page[18:],
    "a sign of life within": lambda page: page[:18] + b"\x52\x02\x08\x01" + page[18:],
    "a sign of life at the end": lambda page: page + b"\x52\x02\x08\x01",
    "a sign of life in the payload's place": lambda page: page[: page.index(b"\x7a", 18)] + b"\x52\x02\x08\x01",
    "a longer number": varint_padded,
    "another order": reordered,
    "a byte more": lambda page: page + b"\x00",
    "a group": lambda page: page[:18] + b"\x73\x74" + page[18:],
    "the page twice": lambda page: page + page,
    "a number that does not end": lambda page: b"\x10" + b"\xff" * 100_000,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_page_in_any_other_form_is_damaged(form: str) -> None:
    """Most of these are the same message for a parser, and so would any damage be that it reads like that."""
    puller = Puller("bfloat16")
    page = next(page for page in puller.messages() if b"\x10\x02\x18" in page)
    changed = FORMS[form](page)
    assert changed != page and not puller.takes(changed)
    with pytest.raises(IncompleteContext):
        decode_page(changed)


def test_a_page_cut_anywhere_is_damaged() -> None:
    puller = Puller("float32")
    for page in puller.messages()[::4]:
        assert not any(puller.takes(page[:size]) for size in range(len(page)))


def test_only_a_sign_of_life_is_one() -> None:
    assert decode_page(encode_waiting(3)) is None
    for data in (b"", b"\x52\x00\x10\x01", encode_waiting(3) + b"\x00", encode_waiting(3) * 2, b"\x52\x03\x08\x83\x00"):
        with pytest.raises(IncompleteContext):
            decode_page(data)


def test_the_checksum_is_what_the_protocol_says() -> None:
    (page, *_) = Puller("bfloat16").messages()
    message = kv_pb2.PullResponse.FromString(page)
    numbers = ("layer", "token_begin", "token_end", "head_begin", "head_end", "head_dim", "dtype")
    header = len(message.digest).to_bytes(4, "little") + message.digest
    header += b"".join(getattr(message, name).to_bytes(4, "little") for name in numbers)
    assert message.checksum == xxh3_64(message.payload + header).intdigest()


def damages(page: bytes) -> Iterator[bytes]:
    """The page with damage of its header: each of these named another page that is wanted, or none."""
    yield page[:18] + b"\x10\x02" + page[18:]
    message = kv_pb2.PullResponse.FromString(page)
    for layer in {0, 1, 2} - {message.layer}:
        message.layer = layer
        yield message.SerializeToString()


def test_a_header_damaged_once_is_asked_for_again_and_twice_fails_with_its_cause() -> None:
    async def test(pair: Pair) -> None:
        ref = pair.ref()
        fill(pair.there)
        pair.source.damage = lambda data, count: list(damages(data))[count % 3] if count <= 3 else data
        await pair.fetch(ref)
        check(pair.here)
        assert pair.here.stats().retried_pages == 3
        pair.source.damage = lambda data, count: list(damages(data))[1]
        third = (b"c" * 16, 3)
        ref = pair.ref(third)
        fill(pair.there, third)
        await fails(pair, IncompleteContext, third[0].hex(), "thinker", "checksum", "asked for twice", refs=[ref])

    run(test)


def test_a_peer_with_another_rule_for_pages_is_told_so() -> None:
    """Not that all pages are damaged, nor that the model is another one."""

    async def test(pair: Pair) -> None:
        fill_later = pair.ref()
        fill(pair.there)
        for theirs, word in ((0, r"rule 1 \(it does not say\)"), (9, "rule 9")):
            ref = pair.ref(page_version=theirs, fingerprint=b"other")
            with pytest.raises(ForeignContext, match=f"thinker sends pages of K/V by {word}.*rule 2; run the same"):
                await pair.fetch(ref)
            request = kv_pb2.PullRequest(
                digests=[b"a" * 16],
                lease_id=fill_later.lease_id,
                **{**OURS, "page_version": theirs},
            )
            with pytest.raises(ForeignContext, match=f"the puller reads pages of K/V by {word}"):
                async for _ in pair.source._pages(request):
                    pass
        pair.there.release([fill_later.lease_id])
        await pair.settled()

    run(test)
