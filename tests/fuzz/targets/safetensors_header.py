"""Safetensors files, as a checkpoint brings them."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bagel.checkpoint.headers import ITEM_BITS, read_header
from bagel.errors import CheckpointError
from tests.fuzz.target import Target, check_message

FILE = Path(tempfile.gettempdir()) / f"bagel-fuzz-{os.getpid()}.safetensors"


def check(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        header = read_header(FILE)
    except CheckpointError as error:
        check_message(error)
        raise
    finally:
        FILE.unlink()
    # Read again by the format's own words.
    (length,) = struct.unpack_from("<Q", data)
    told = json.loads(data[8 : 8 + length])
    told.pop("__metadata__", None)
    assert {name: (each.dtype, list(each.shape), [each.begin, each.end]) for name, each in header.tensors.items()} == {
        name: (each["dtype"], each["shape"], each["data_offsets"]) for name, each in told.items()
    }
    assert header.data_start == 8 + length and header.nbytes == len(data)
    bits = 0
    for each in told.values():
        count = ITEM_BITS[each["dtype"]]
        for side in each["shape"]:
            count *= side
        bits += count
    assert bits == 8 * (len(data) - 8 - length), "its tensors are not exactly its bytes"


def stored(header: object, data: int) -> bytes:
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + bytes(data)


def seeds() -> Iterable[bytes]:
    a = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    b = {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}
    yield stored({"a": a, "b": b}, 24)
    yield stored({"__metadata__": {"format": "pt"}, "b": a}, 16)
    yield stored({"e": {"dtype": "F4", "shape": [0, 3], "data_offsets": [0, 0]}}, 0)
    yield stored({}, 0)
    names = [f'"{number}":0' for number in range(20_000)]  # in time that grows with their number alone
    text = "{" + ",".join([*names, names[-1]]) + "}"
    yield struct.pack("<Q", len(text)) + text.encode()


WORDS = rb'"dtype" "shape" "data_offsets" "__metadata__" [0,0] NaN 1e3 -1 true null \u0000'.split()
TARGET = Target(check, (CheckpointError,), seeds, words=(*WORDS, *(f'"{each}"'.encode() for each in ITEM_BITS)))
