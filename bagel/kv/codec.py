"""Pages on the wire: serialized `PullResponse` messages, made and read without protobuf's copies.

The header goes through the generated class. The payload is the message's last field and is appended as it is, so that
each page is copied once by a sender and not at all by a reader; a stock parser reads the same bytes.

A page has one form only: whatever bit of it is flipped, it is either no page any more or fails its checksum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct

from google.protobuf.message import DecodeError
from xxhash import xxh3_64

from bagel.errors import IncompleteContext
from bagel.kv.pages import PageKey
from bagel.rpc.structure import varint
from bagel.v1 import kv_pb2

PAGE_VERSION = 2
"""The rule that pages are written and checked by. Peers tell each other theirs, and refuse another one.

It changes with whatever a peer of the rule before would take for damage.
"""
PAYLOAD_TAG = 15 << 3 | 2
LONGEST_VARINT = 10
DTYPES = {
    "float32": kv_pb2.KV_DTYPE_FLOAT32,
    "bfloat16": kv_pb2.KV_DTYPE_BFLOAT16,
    "float16": kv_pb2.KV_DTYPE_FLOAT16,
}
_NUMBERS = Struct("<7I")
_LENGTH = Struct("<I")

Parts = tuple[memoryview | bytes, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """One page as received. heads is (begin, end); the payload is K rows, then V rows, not yet checked."""

    key: PageKey
    token_end: int
    heads: tuple[int, int]
    head_dim: int
    dtype: int
    checksum: int
    payload: memoryview

    def found_checksum(self) -> int:
        """What the checksum of such a page must be."""
        return _checksum(self.key, (self.token_end, *self.heads, self.head_dim, self.dtype), (self.payload,))


def version_misfit(theirs: int) -> str | None:
    """Why pages cannot be exchanged with a peer whose rule for them is `theirs`; None if they can."""
    if theirs == PAGE_VERSION:
        return None
    rule = theirs or "1 (it does not say)"
    return f"pages of K/V by rule {rule}, those here are by rule {PAGE_VERSION}; run the same release on both sides"


def encode_page(
    key: PageKey, token_end: int, heads: tuple[int, int], head_dim: int, dtype: str, payload: Parts
) -> bytes:
    """A serialized `PullResponse`; the payload is given in parts (K, V), which are copied once."""
    facts = (token_end, *heads, head_dim, DTYPES[dtype])
    size = sum(len(part) for part in payload)
    return b"".join((_head(key, facts, _checksum(key, facts, payload), size), *payload))


def encode_waiting(pages: int) -> bytes:
    """A serialized `PullResponse` that is a sign of life: so many pages are still to come."""
    return kv_pb2.PullResponse(waiting=kv_pb2.Waiting(pages=pages)).SerializeToString()


def decode_page(data: bytes) -> Page | None:
    """The page, its payload a view of `data`; None for a sign of life.

    Raises IncompleteContext for bytes that `encode_page` or `encode_waiting` would not have written: an unknown,
    repeated or misplaced field, or a number written longer than it need be, is damage that a parser would not see.
    """
    try:
        found = _find_payload(data)
        message = kv_pb2.PullResponse.FromString(data if found is None else data[: found[0]])
    except (DecodeError, IndexError) as error:
        raise IncompleteContext(f"a page of {len(data)} bytes is not readable: {error}") from error
    if found is None:
        if message.HasField("waiting") and data == encode_waiting(message.waiting.pages):
            return None
        raise _odd(data)
    page = _page(message, memoryview(data)[found[1] :])
    facts = (page.token_end, *page.heads, page.head_dim, page.dtype)
    # Encoded again and compared: a parser accepts fields that are unknown, repeated or out of order.
    if data[: found[1]] != _head(page.key, facts, page.checksum, len(page.payload)):
        raise _odd(data)
    return page


def _odd(data: bytes) -> IncompleteContext:
    return IncompleteContext(
        f"a message of {len(data)} bytes is neither a page nor a sign of life: a field is missing, unknown, repeated "
        "or not in its place"
    )


def _checksum(key: PageKey, facts: Iterable[int], payload: Parts) -> int:
    """xxh3 (64 bits) of a page's payload and header, as kv.proto says."""
    digest = xxh3_64()
    for part in payload:  # first, as it lies in memory at addresses that are read fastest
        digest.update(part)
    # A damaged page may have a negative number, which the unsigned format would refuse.
    numbers = (number & 0xFFFFFFFF for number in (key.layer, key.token_begin, *facts))
    # The digest's length comes first, so that a digest and the numbers behind it are never read as another pair.
    digest.update(_LENGTH.pack(len(key.digest)) + key.digest + _NUMBERS.pack(*numbers))
    return digest.intdigest()


def _head(key: PageKey, facts: tuple[int, ...], checksum: int, payload_bytes: int) -> bytes:
    """What comes before a page's payload. facts: token end, heads' begin and end, head dim, type."""
    token_end, head_begin, head_end, head_dim, dtype = facts
    header = kv_pb2.PullResponse(
        digest=key.digest,
        layer=key.layer,
        token_begin=key.token_begin,
        token_end=token_end,
        head_begin=head_begin,
        head_end=head_end,
        head_dim=head_dim,
        dtype=dtype,  # type: ignore[arg-type]  # a damaged one has any number
        checksum=checksum,
    ).SerializeToString()
    return b"".join((header, bytes((PAYLOAD_TAG,)), varint(payload_bytes)))


def _page(header: kv_pb2.PullResponse, payload: memoryview) -> Page:
    return Page(
        PageKey(header.digest, header.layer, header.token_begin),
        header.token_end,
        (header.head_begin, header.head_end),
        header.head_dim,
        header.dtype,
        header.checksum,
        payload,
    )


def _find_payload(data: bytes) -> tuple[int, int] | None:
    """(end of the header, begin of the payload) if the payload is the last field; None for another order."""
    at, size = 0, len(data)
    while at < size:
        tag, start = data[at], at
        at += 1
        match tag & 7:
            # Numbers above 15 take a second byte of tag; a page has no such field.
            case _ if tag > 127:
                return None
            case 0:
                _, at = _read_varint(data, at)
            case 1:
                at += 8
            case 2:
                length, at = _read_varint(data, at)
                if tag == PAYLOAD_TAG:
                    return (start, at) if at + length == size else None
                at += length
            case _:
                return None
    return None


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, index after it)."""
    value = 0
    # Bounded, since damaged bytes could continue a number without end.
    for shift in range(0, 7 * LONGEST_VARINT, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DecodeError(f"the number at byte {at - LONGEST_VARINT} does not end")
