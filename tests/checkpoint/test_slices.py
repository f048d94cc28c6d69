"""Parts of tensors, read from a file byte by byte where they lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bagel.checkpoint.headers import read_header
from bagel.checkpoint.slices import SliceReader, TensorSlice
from bagel.errors import CheckpointError

TABLE = torch.arange(24, dtype=torch.int16).view(2, 3, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with TABLE between two other tensors."""
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.full((5,), -1.0), "table": TABLE, "z": torch.full((5,), -1.0)}, path)
    return path


def read(path: Path, dimension: int, start: int, stop: int) -> torch.Tensor:
    part = TensorSlice("table", dimension, start, stop)
    found = torch.empty(TABLE.narrow(dimension, start, stop - start).shape, dtype=torch.int16)
    with SliceReader(path, read_header(path)) as reader:
        reader.read(part, found.view(torch.uint8).numpy().data.cast("B"))
    return found


@pytest.mark.parametrize(("dimension", "start", "stop"), [(0, 0, 2), (0, 1, 2), (1, 1, 3), (1, 0, 3), (2, 2, 3)])
def test_a_slice_along_any_dimension_is_that_part_of_the_tensor(
    path: Path, dimension: int, start: int, stop: int
) -> None:
    assert torch.equal(read(path, dimension, start, stop), TABLE.narrow(dimension, start, stop - start))


def test_a_system_call_that_gives_less_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives at most 2 GiB at a time."""
    preadv = os.preadv

    def little(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", little)
    assert torch.equal(read(path, 1, 1, 3), TABLE[:, 1:])


def test_a_file_that_went_away_or_became_shorter_is_named(path: Path) -> None:
    header, buffer = read_header(path), memoryview(bytearray(48))
    with SliceReader(path, header) as reader:
        os.truncate(path, header.data_start + header.tensors["table"].begin + 10)
        with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read: it ends at byte \d+"):
            reader.read(TensorSlice("table", 0, 0, 2), buffer)
    path.unlink()
    with (
        pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read: No such file"),
        SliceReader(path, header),
    ):
        pass
