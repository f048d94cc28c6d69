"""When a Thinker has to be ready before the DiT starts, and which share of their GPU it then takes."""

from __future__ import annotations

import pytest

from bagel.deployment import shared_gpu
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.schema import DeployConfig
from bagel.deployment.shared_gpu import SHARE, leaving_room, measures_shared_gpu
from bagel.deployment.thinker_config import ThinkerConfig
from tests.deployment.test_deploy_file import parse_deploy_config


def stages(thinker: str, dit: str) -> DeployConfig:
    ranks = {"tensor_parallel_size": 1 + thinker.count(","), "engine": "vllm"}
    devices = [{"stage_id": 0, "devices": thinker, **ranks}, {"stage_id": 1, "devices": dit}]
    return parse_deploy_config({"pipeline": "bagel", "stages": devices})


@pytest.mark.parametrize(
    ("gpu", "engine", "device", "thinker", "dit", "first"),
    [
        (True, "vllm", "auto", "0", "0", True),
        (True, "vllm", "cuda", "0,1", "1", True),
        (True, "vllm", "cuda:1", "0", "1", True),  # both are told to use GPU 1
        (True, "vllm", "auto", "0", "1", False),
        (True, "torch", "auto", "0", "0", False),
        (True, "vllm", "cpu", "0", "0", False),
        (False, "vllm", "auto", "0", "0", False),
    ],
)
def test_a_thinker_on_vllm_that_shares_its_gpu_starts_first(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, engine: str, device: str, thinker: str, dit: str, first: bool
) -> None:
    monkeypatch.setattr(shared_gpu, "has_gpu", lambda: gpu)
    config = stages(thinker, dit)
    reads = ThinkerConfig(model="m", engine=engine, device=device)
    draws = DitConfig(model="m", device=device)
    assert measures_shared_gpu(reads, config.stage(0), [(draws, config.stage(1))]) == first
    assert not measures_shared_gpu(draws, config.stage(1), [])


def test_a_share_that_is_set_is_kept() -> None:
    assert leaving_room(ThinkerConfig(model="m")) == ThinkerConfig(model="m", gpu_memory_utilization=SHARE)
    chosen = ThinkerConfig(model="m", gpu_memory_utilization=0.6)
    assert leaving_room(chosen) == chosen
