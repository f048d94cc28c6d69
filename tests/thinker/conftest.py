"""The torch engine that the Thinker's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bagel.checkpoint.files import Checkpoint
from bagel_thinker.torch_engine import TorchEngine


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Iterator[TorchEngine]:
    engine = TorchEngine.load("tiny", checkpoint, device="cpu", dtype="auto", kv_store_bytes=2**24, max_num_seqs=4)
    yield engine
    engine.close()
