"""The configuration of the Thinker. A new setting of it is one field here and one line of docs. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from bagel.checkpoint.roles import Role
from bagel.deployment.settings import setting, settings_of
from bagel.deployment.shared_settings import (
    ENGINES,
    KV_BYTES,
    OF_STAGE,
    STEP_TIMEOUT_S,
    Listening,
    OfModel,
    ReadingImages,
    allowed_callers,
    known_as,
    listen_at,
)
from bagel.errors import ConfigError

ENGINE_VARIABLE = "BAGEL_ENGINE"
VLLM = "vLLM"
"""The heading of settings that only this engine has."""
LEASE_S = 10.0


def default_engine() -> str:
    """The engine that the environment names; raises ConfigError for one that there is not."""
    engine = os.environ.get(ENGINE_VARIABLE, "auto")
    if engine not in ENGINES:
        raise ConfigError(f"{ENGINE_VARIABLE} is {engine!r}; it must be one of {', '.join(ENGINES)}")
    return engine


@dataclass(frozen=True, kw_only=True)
class ThinkerConfig(ReadingImages, OfModel, Listening):
    """Everything that a Thinker is started with. None leaves a choice to its engine."""

    MODULE: ClassVar = "bagel_thinker"
    ABOUT: ClassVar = "Reads prompts, writes text, gives out K/V."
    CALLERS: ClassVar = ("gateway", "dit")

    listen: str = listen_at("127.0.0.1:50052")
    name: str = known_as("thinker-0")
    tls_allow_clients: tuple[str, ...] | None = allowed_callers(*CALLERS)
    engine: str = setting(
        "what computes; auto: vllm where it is installed and there is a GPU, else torch "
        f"(default: {ENGINE_VARIABLE} of the environment, else auto)",
        default_factory=default_engine, choices=ENGINES, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    role: Role = setting(
        "understand: no generation expert is loaded, and images to edit are refused (default: context)",
        default=Role.CONTEXT, choices=(Role.CONTEXT, Role.UNDERSTAND),
        elsewhere="of a Thinker that draws nothing; start python -m bagel_thinker by itself",
    )  # fmt: skip
    tensor_parallel_size: int = setting(
        "GPUs of one model",
        default=1, metavar="N", at_least=1, heading=VLLM, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    max_num_batched_tokens: int | None = setting(
        "tokens of one forward pass",
        default=None, metavar="N", at_least=1, heading=VLLM, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    gpu_memory_utilization: float | None = setting(
        "share of the GPU's memory",
        default=None, metavar="X", above=0, at_most=1, heading=VLLM, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    enable_prefix_caching: bool | None = setting(
        "keep equal beginnings", default=None, heading=VLLM, stage=True, elsewhere=OF_STAGE
    )
    quantization: str | None = setting(
        "vLLM's name of a way to quantise, like fp8",
        default=None, metavar="NAME", heading=VLLM, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    kv_store_bytes: int = setting("shared memory for K/V", default=KV_BYTES, at_least=1)
    kv_device_bytes: int | None = setting(
        "the torch engine's memory of the device for K/V of texts under way (default: 131,072 tokens, at most half of "
        "what the model leaves free on a GPU, a quarter of the memory for a CPU)",
        default=None, metavar="N", at_least=1,
    )  # fmt: skip
    lease_seconds: float = setting("how long unrenewed K/V are kept", default=LEASE_S, above=0)
    # A long prompt of the full-size model on a CPU takes minutes.
    step_timeout_s: float = setting(
        "a step of the engine that takes longer has hung, and the service ends",
        default=STEP_TIMEOUT_S, metavar="S", above=0,
    )  # fmt: skip


TORCH_LACKS = ("tensor_parallel_size", "quantization")
"""Those of vLLM's settings that are features, which a Thinker on torch refuses; the others only tune vLLM."""
VLLM_ONLY = tuple(each for each in settings_of(ThinkerConfig) if each.heading == VLLM)
"""Settings that the torch engine does not have."""
