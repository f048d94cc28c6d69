"""What the settings of kernels do to a rank and to the torch Thinker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.shared_settings import ATTENTION_BACKENDS
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.errors import ConfigError, NotSupported
from bagel.model.attention_backends import AUTO, BACKENDS
from bagel.model.backend import LayerBackend, choose_backend
from bagel_dit.workers import RankSettings, rank
from bagel_thinker.loading import load_engine


def settings(checkpoint: Checkpoint, **more: Any) -> RankSettings:
    return RankSettings(DitConfig(model="tiny", device="cpu", **more), Path(checkpoint.folder))


def test_every_attention_backend_can_be_asked_for() -> None:
    assert set(ATTENTION_BACKENDS) == {AUTO, *BACKENDS}


def test_a_backend_that_cannot_run_here_ends_the_loading(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="attention_backend fa3 runs on CUDA devices, not on cpu"):
        rank.load(settings(checkpoint, attention_backend="fa3"))


def test_enforce_eager_reaches_the_choice_of_kernels(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def choose(device: torch.device, dtype: torch.dtype, *, eager: bool, **more: Any) -> LayerBackend:
        asked.append(eager)
        return choose_backend(device, dtype, **more)

    monkeypatch.setattr("bagel.model.weights.choose_backend", choose)
    rank.load(settings(checkpoint, enforce_eager=True))
    rank.load(settings(checkpoint))
    for eager in (True, False):
        config = ThinkerConfig(model="tiny", device="cpu", enforce_eager=eager, kv_store_bytes=2**24, engine="torch")
        load_engine(config, checkpoint).close()
    assert asked == [True, False, True, False]


def test_a_rank_quantises_as_the_settings_say_and_a_torch_thinker_refuses_to(checkpoint: Checkpoint) -> None:
    for single_stage in (False, True):
        told = settings(checkpoint, quantization="fp8", dtype="bfloat16", single_stage=single_stage)
        assert rank.load(told).model.quantization == "fp8"
    with pytest.raises(NotSupported, match="the torch engine has no quantization; leave it out, or start the Thinker"):
        load_engine(ThinkerConfig(model="tiny", device="cpu", quantization="fp8", engine="torch"), checkpoint)


def test_weights_stay_on_the_host_for_a_gpu_alone(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ConfigError, match="cpu_offload keeps weights for a GPU in the host's memory; on a CPU they are"
    ):
        rank.load(settings(checkpoint, cpu_offload="layers"))
