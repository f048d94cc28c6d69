"""What a rank loads its model with, and that it is warm before it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.shared_settings import ATTENTION_BACKENDS
from bagel.errors import ConfigError
from bagel.model.attention_backends import AUTO, BACKENDS
from bagel_dit.workers import RankSettings, rank


def settings(checkpoint: Checkpoint, **more: Any) -> RankSettings:
    return RankSettings(DitConfig(model="tiny", device="cpu", **more), Path(checkpoint.folder))


def test_every_attention_backend_can_be_asked_for() -> None:
    assert set(ATTENTION_BACKENDS) == {AUTO, *BACKENDS}


def test_a_backend_that_cannot_run_here_ends_the_loading(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="attention_backend fa3 runs on CUDA devices, not on cpu"):
        rank.load(settings(checkpoint, attention_backend="fa3"))


def test_enforce_eager_reaches_the_choice_of_kernels(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from bagel.model import weights

    choose, asked = weights.choose_backend, list[bool]()
    monkeypatch.setattr(weights, "choose_backend", lambda *args, eager, **how: asked.append(eager) or choose(*args))
    rank.load(settings(checkpoint, enforce_eager=True))
    rank.load(settings(checkpoint))
    assert asked == [True, False]
