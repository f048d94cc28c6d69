"""Pages on the wire: serialized `PullResponse` messages, made and read without protobuf's copies.

The header goes through the generated class. The payload is the message's last field and is appended as it is, so that
each page is copied once by a sender and not at all by a reader; a stock parser reads the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError
from xxhash import xxh3_64

from bagel.errors import IncompleteContext
from bagel.kv.pages import PageKey
from bagel.v1 import kv_pb2

PAYLOAD_TAG = 15 << 3 | 2
DTYPES = {
    "float32": kv_pb2.KV_DTYPE_FLOAT32,
    "bfloat16": kv_pb2.KV_DTYPE_BFLOAT16,
    "float16": kv_pb2.KV_DTYPE_FLOAT16,
}

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


def checksum(parts: Parts) -> int:
    """xxh3 (64 bits) of the parts put together."""
    digest = xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def encode_page(
    key: PageKey, token_end: int, heads: tuple[int, int], head_dim: int, dtype: str, payload: Parts
) -> bytes:
    """A serialized `PullResponse`; the payload is given in parts (K, V), which are copied once."""
    header = kv_pb2.PullResponse(
        digest=key.digest,
        layer=key.layer,
        token_begin=key.token_begin,
        token_end=token_end,
        head_begin=heads[0],
        head_end=heads[1],
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        checksum=checksum(payload),
    ).SerializeToString()
    size = sum(len(part) for part in payload)
    return b"".join((header, bytes((PAYLOAD_TAG,)), _varint(size), *payload))


def encode_waiting(pages: int) -> bytes:
    """A serialized `PullResponse` that is a sign of life: so many pages are still to come."""
    return kv_pb2.PullResponse(waiting=kv_pb2.Waiting(pages=pages)).SerializeToString()


def decode_page(data: bytes) -> Page | None:
    """The page in any valid serialization, its payload a view of `data` where the payload comes last.

    None for a sign of life. Raises IncompleteContext for bytes that are no `PullResponse`.
    """
    try:
        found = _find_payload(data)
        if found is None:
            message = kv_pb2.PullResponse.FromString(data)
            if message.HasField("waiting") and not message.payload:
                return None
            return _page(message, memoryview(message.payload))
        header_end, begin = found
        return _page(kv_pb2.PullResponse.FromString(data[:header_end]), memoryview(data)[begin:])
    except (DecodeError, IndexError) as error:
        raise IncompleteContext(f"a page of {len(data)} bytes is not readable: {error}") from error


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
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
