"""Read a safetensors file's header and check it in full before using any of it. No torch here.

The format: https://huggingface.co/docs/safetensors. The library checks most of this too, but later, and its errors do
not say which tensor is wrong.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from bagel.checkpoint.json_files import LARGEST_BYTES, parse_json_object, shown, shown_name
from bagel.errors import CheckpointError

ITEM_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits per element of each type in the format."""
MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a safetensors header; begin and end are offsets into the file's data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's tensors by name; data_start: the offset of their bytes; nbytes: the file's length."""

    tensors: Mapping[str, TensorInfo]
    data_start: int
    nbytes: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file; raises CheckpointError, naming file and tensor, if it is malformed."""
    try:
        with path.open("rb") as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            length = _length(stream.read(8), nbytes)
            data = stream.read(length)
        entries = parse_json_object(data)  # refuses a name that occurs twice, which would hide a tensor
        _check_metadata(entries.pop("__metadata__", {}))
        tensors = {name: _info(name, entry) for name, entry in entries.items()}
        header = Header(tensors, 8 + length, nbytes)
        end = _check_layout(tensors)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    if nbytes < header.data_start + end:
        raise CheckpointError(f"{path} is cut short: {nbytes} of {header.data_start + end} bytes; download it again")
    if nbytes > header.data_start + end:  # no tensor owns these bytes, so the fingerprint would not cover them
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {nbytes - header.data_start - end} bytes behind its last "
            "tensor belong to none; download it again"
        )
    return header


def _length(start: bytes, nbytes: int) -> int:
    if len(start) < 8:
        raise ValueError(f"it has {len(start)} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > nbytes - 8:  # before any of it is read: a damaged length could ask for exabytes
        raise ValueError(f"the header is longer than the file: {length} of {nbytes} bytes")
    if length > LARGEST_BYTES:
        raise ValueError(f"the header has {length} bytes; at most {LARGEST_BYTES} are read")
    return int(length)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ is {shown(metadata)}; an object of texts was expected")


def _info(name: str, entry: Any) -> TensorInfo:
    where = shown_name(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {shown(entry)}; an object with dtype, shape and data_offsets was expected")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ValueError(f"{where}: dtype is {shown(dtype)}, which is none of the format's types")
    if not _naturals(shape) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{where}: shape is {shown(shape)}; a list of up to {MOST_DIMENSIONS} sizes was expected")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets is {shown(offsets)}; [begin, end] was expected")
    size, bits = offsets[1] - offsets[0], math.prod(shape) * ITEM_BITS[dtype]
    if bits != 8 * size:
        raise ValueError(
            f"{where}: data_offsets {shown(offsets)} are {size} bytes; {dtype} {shown(shape)} has {bits // 8}"
        )
    return TensorInfo(dtype, tuple(shape), *offsets)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of whole numbers of at least 0; True and False do not count as numbers."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_layout(tensors: Mapping[str, TensorInfo]) -> int:
    """Check that the tensors' bytes follow one another without gap or overlap; returns the offset of their end."""
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            what = f"overlaps {shown_name(before)}" if info.begin < end else "lies behind bytes of no tensor"
            raise ValueError(f"{shown_name(name)}: data_offsets begin at {info.begin} instead of {end}: it {what}")
        end, before = info.end, name
    return end
