"""The configuration of the DiT. A new setting of it is one field here and one line of docs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bagel.deployment.parallel_settings import OnRanks
from bagel.deployment.settings import setting
from bagel.deployment.shared_settings import (
    ATTENTION_BACKENDS,
    KV_BYTES,
    OF_STAGE,
    OFFLOADS,
    QUANTIZATIONS,
    SERVICE,
    STEP_TIMEOUT_S,
    WIRED,
    Calling,
    Listening,
    OfModel,
    ReadingImages,
    allowed_callers,
    known_as,
    listen_at,
)
from bagel.errors import ConfigError

PAGE_TIMEOUT_S = 30.0
"""A source that waits says so; a connection that is dead is noticed sooner, by keepalive."""


@dataclass(frozen=True, kw_only=True)
class DitConfig(OnRanks, ReadingImages, OfModel, Calling, Listening):
    """Everything that a DiT is started with; its ranks get the same."""

    MODULE: ClassVar = "bagel_dit"
    ABOUT: ClassVar = "Draws pictures from K/V, or serves whole requests."
    CALLERS: ClassVar = ("gateway",)

    listen: str = listen_at("127.0.0.1:50053")
    name: str = known_as("dit-0")
    tls_allow_clients: tuple[str, ...] | None = allowed_callers(*CALLERS)
    single_stage: bool = setting("load the whole model and serve whole requests", default=False, elsewhere=WIRED)
    sources: tuple[str, ...] = setting(
        "a peer that K/V may be pulled from; may be given again",
        default=(), flag="--source", metavar="NAME=HOST:PORT", shape=SERVICE, elsewhere=WIRED,
    )  # fmt: skip
    vae_use_tiling: bool = setting(
        "decode and encode large pictures in tiles: less memory", default=False, stage=True, elsewhere=OF_STAGE
    )
    attention_backend: str = setting(
        "what computes attention; auto: the fastest that runs on the device",
        default="auto", choices=ATTENTION_BACKENDS, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    quantization: str | None = setting(
        "format of the decoder's weights, which are quantised as they are loaded: half the memory, less exact",
        default=None, choices=QUANTIZATIONS, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    cpu_offload: str | None = setting(
        "layers: keep the weights of the decoder's layers in the host's memory and copy them to the GPU as they are "
        "needed: the least memory, the same result, slower",
        default=None, choices=OFFLOADS, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    kv_cache_bytes: int = setting("shared memory for K/V", default=KV_BYTES, at_least=1)
    kv_page_timeout_s: float = setting("without a word of a source", default=PAGE_TIMEOUT_S, metavar="S", above=0)
    kv_device_bytes: int | None = setting(
        "memory of the device for K/V of pictures under way (default: 131,072 tokens, at most half of what the model "
        "leaves free on a GPU, a quarter of the memory for a CPU)",
        default=None, metavar="N", at_least=1,
    )  # fmt: skip
    step_timeout_s: float = setting(
        "a step that gets on with no layer for so long has hung: the runner is killed and started again",
        default=STEP_TIMEOUT_S, metavar="S", above=0,
    )  # fmt: skip
    enable_diffusion_pipeline_profiler: bool = setting(
        "log the durations of each picture's diffusion stages, and tell the caller", default=False
    )

    @property
    def tiling(self) -> bool:
        """The effective vae_use_tiling."""
        return self.vae_use_tiling or self.parallel.vae_use_tiling

    def check(self) -> None:
        """Raise ConfigError for settings that do not fit together."""
        super().check()
        if self.parallel.world_size > 1 and self.device.startswith("cuda:"):
            raise ConfigError(
                f"device is {self.device}, one GPU, for {self.parallel.world_size} ranks; use cuda, and name the GPUs "
                "with devices in the deploy file, or CUDA_VISIBLE_DEVICES",
                "device",
            )

    @property
    def source_addresses(self) -> dict[str, str]:
        """The peers that K/V may be pulled from: host:port by name."""
        return dict(source.split("=", 1) for source in self.sources)
