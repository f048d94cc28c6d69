"""Read parts of tensors from a safetensors file, and no other bytes of it. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

from bagel.checkpoint.headers import ITEM_BITS, Header
from bagel.errors import CheckpointError


@dataclass(frozen=True)
class TensorSlice:
    """The entries from start to stop along one dimension of a tensor."""

    name: str
    dimension: int
    start: int
    stop: int


class SliceReader:
    """An open safetensors file whose header has been checked."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self._descriptor = -1

    def __enter__(self) -> SliceReader:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, part: TensorSlice, into: memoryview) -> None:
        """Read a slice's elements, in their order, into as many bytes."""
        info = self._header.tensors[part.name]
        entry = prod(info.shape[part.dimension + 1 :]) * ITEM_BITS[info.dtype] // 8
        row, wanted = info.shape[part.dimension] * entry, (part.stop - part.start) * entry
        begin = self._header.data_start + info.begin + part.start * entry
        if wanted == row:  # the whole dimension: its bytes are contiguous, so one read is enough
            self._read(into, begin)
            return
        for i in range(prod(info.shape[: part.dimension])):
            self._read(into[i * wanted : (i + 1) * wanted], begin + i * row)

    def _read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from the file's byte `offset` on."""
        done = 0
        while done < len(into):  # one system call may return fewer bytes than requested
            try:
                count = os.preadv(self._descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self._path} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self._path} cannot be read: it ends at byte {offset + done}")
            done += count
