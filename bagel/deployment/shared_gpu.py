"""A Thinker on vLLM that shares its GPU with another stage.

vLLM measures at its start how much of the GPU it uses, and takes all that has come into use meanwhile for its own. What
another process loads at that time leaves it less room for K/V, or none. So it starts before the other stage does, with
a share of the GPU that leaves room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gpus import has_gpu
from bagel.deployment.schema import StageDeploy
from bagel.deployment.thinker_config import ThinkerConfig

SHARE = 0.45
"""The share of its GPU for a Thinker that does not set one. On 80 GB both stages then have what they need."""

Config = ThinkerConfig | DitConfig


def measures_shared_gpu(service: Config, stage: StageDeploy, others: Sequence[tuple[Config, StageDeploy]]) -> bool:
    """Whether this is a Thinker that will run on vLLM, on a GPU that one of the others uses too."""
    return (
        isinstance(service, ThinkerConfig)
        and any(_gpus(service, stage) & _gpus(*other) for other in others)
        and _takes_vllm(service.engine)
    )


def leaving_room(service: Config) -> Config:
    """A Thinker with a share of its GPU, if it has none yet."""
    if isinstance(service, ThinkerConfig) and service.gpu_memory_utilization is None:
        return replace(service, gpu_memory_utilization=SHARE)
    return service


def _gpus(service: Config, stage: StageDeploy) -> set[int]:
    """The numbers of the GPUs that a service uses, if there are any."""
    if service.device in ("auto", "cuda"):
        return set(stage.device_ids)
    return {int(service.device.removeprefix("cuda:"))} if service.device.startswith("cuda:") else set()


def _takes_vllm(engine: str) -> bool:
    """Whether a Thinker with this engine computes with vLLM on a GPU: as it decides itself once it is loaded."""
    return has_gpu() and (engine == "vllm" or (engine == "auto" and find_spec("vllm") is not None))
