"""The settings of an engine that runs on several GPUs. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bagel.deployment.settings import Config, setting
from bagel.deployment.shared_settings import OF_STAGE, WORKER_BACKENDS
from bagel.errors import ConfigError
from bagel.parallel.config import CFG_SIZES, ParallelConfig

RAY_TIMEOUT_S = 120.0
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
    worker_backend: str = setting(
        "what runs the ranks: processes of this host, or actors of a Ray cluster",
        default="process", choices=WORKER_BACKENDS, heading=_GPUS,
    )  # fmt: skip
    ray_address: str | None = setting(
        "with --worker-backend ray: the cluster that this host is a node of (default: a Ray of this host alone, "
        "started and stopped with the service)",
        default=None, metavar="HOST:PORT", heading=_GPUS,
    )  # fmt: skip
    ray_timeout_s: float = setting(
        "with --worker-backend ray: for the cluster to have room for all ranks",
        default=RAY_TIMEOUT_S, metavar="S", above=0, heading=_GPUS,
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
        """Raise ConfigError for settings that do not fit together."""
        super().check()
        self.parallel  # noqa: B018  made to be checked
        check_ray_address(self.worker_backend, self.ray_address)


def check_ray_address(worker_backend: str, address: str | None) -> None:
    """Raise ConfigError for the address of a Ray cluster that is no such address, or that nothing has a use for."""
    if address is None:
        return
    if worker_backend != "ray":
        raise ConfigError(
            f"ray_address is {address!r}, with {worker_backend} as worker backend; it must be ray, or leave this out",
            "ray_address",
        )
    if re.fullmatch(r"[^:/]+:\d+|\[[^]/]+\]:\d+", address) is None:
        raise ConfigError(
            f"ray_address is {address!r}; it must be HOST:PORT as `ray start --head` printed it, like 10.0.0.5:6379, "
            "and this host a node of that cluster (`ray start --address HOST:PORT`); Ray's client, ray://, is none",
            "ray_address",
        )
