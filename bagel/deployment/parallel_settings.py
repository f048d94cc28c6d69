"""The settings of an engine that runs on several GPUs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from bagel.deployment.settings import Config, setting
from bagel.deployment.shared_settings import OF_STAGE
from bagel.parallel.config import CFG_SIZES, ParallelConfig

WORKER_BACKENDS = ("process", "ray")
SECTION = "parallel_config"
_GPUS = "several GPUs"


@dataclass(frozen=True, kw_only=True)
class OnRanks(Config):
    """Settings of a service whose engine is spread over ranks."""

    tensor_parallel_size: int = setting(
        "ranks that divide every layer by heads and columns",
        default=1, metavar="N", at_least=1, heading=_GPUS, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    cfg_parallel_size: int = setting(
        "ranks that divide the branches of guidance",
        default=1, metavar="N", at_least=1, at_most=CFG_SIZES[-1], heading=_GPUS, section=SECTION, elsewhere=OF_STAGE,
    )  # fmt: skip
    context_parallel_size: int = setting(
        "ranks that divide the latents of each picture",
        default=1, metavar="N", at_least=1, heading=_GPUS, section=SECTION, elsewhere=OF_STAGE,
    )  # fmt: skip
    vae_patch_parallel_size: int = setting(
        "ranks that divide the tiles that pictures are decoded and encoded in; above 1 it turns --vae-use-tiling on",
        default=1, metavar="N", at_least=1, heading=_GPUS, section=SECTION, elsewhere=OF_STAGE,
    )  # fmt: skip
    use_hsdp: bool = setting(
        "shard the weights over ranks, which divide the rows of a step",
        default=False, heading=_GPUS, section=SECTION, elsewhere=OF_STAGE,
    )  # fmt: skip
    hsdp_shard_size: int = setting(
        "with --use-hsdp: ranks that hold a shard each",
        default=1, metavar="N", at_least=1, heading=_GPUS, section=SECTION, elsewhere=OF_STAGE,
    )  # fmt: skip
    hsdp_replicate_size: int = setting(
        "with --use-hsdp: copies of the sharded weights",
        default=1, metavar="N", at_least=1, heading=_GPUS, section=SECTION, elsewhere=OF_STAGE,
    )  # fmt: skip
    worker_backend: str = setting("what runs the ranks", default="process", choices=WORKER_BACKENDS, heading=_GPUS)
    ray_address: str | None = setting(
        "with --worker-backend ray: the Ray cluster (default: one of this machine)",
        default=None, metavar="ADDRESS", heading=_GPUS,
    )  # fmt: skip

    @property
    def parallel(self) -> ParallelConfig:
        """The sizes as one object."""
        return ParallelConfig(
            self.tensor_parallel_size,
            self.cfg_parallel_size,
            self.context_parallel_size,
            self.vae_patch_parallel_size,
            self.use_hsdp,
            self.hsdp_shard_size,
            self.hsdp_replicate_size,
        )

    def check(self) -> None:
        """Raise ConfigError for sizes that do not fit together."""
        super().check()
        self.parallel  # noqa: B018  made to be checked
