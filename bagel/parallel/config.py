"""How one engine is spread over ranks: the sizes that users set, and the mesh that they make. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from bagel.checkpoint.config import LlmConfig
from bagel.errors import ConfigError
from bagel.parallel.mesh import Mesh, Rank

CFG_SIZES = (1, 2, 3)
"""A picture has at most three branches of guidance."""


@dataclass(frozen=True)
class ParallelConfig:
    """The sizes by vllm-omni's names. Raises ConfigError, naming the key first, for sizes that do not fit together.

    hsdp_shard_size 1 with use_hsdp: as many as the ranks of guidance and context, divided by hsdp_replicate_size.
    """

    tensor_parallel_size: int = 1
    cfg_parallel_size: int = 1
    context_parallel_size: int = 1
    vae_patch_parallel_size: int = 1
    use_hsdp: bool = False
    hsdp_shard_size: int = 1
    hsdp_replicate_size: int = 1

    def __post_init__(self) -> None:
        if self.cfg_parallel_size not in CFG_SIZES:
            raise _wrong("cfg_parallel_size", f"is {self.cfg_parallel_size}; it must be 1, 2 or 3")
        if self.use_hsdp:
            self._check_hsdp()
        elif self.hsdp_shard_size > 1 or self.hsdp_replicate_size > 1:
            raise _wrong("use_hsdp", "is False; it must be true for hsdp_shard_size or hsdp_replicate_size above 1")
        if self.vae_patch_parallel_size > self.world_size:
            raise _wrong(
                "vae_patch_parallel_size",
                f"is {self.vae_patch_parallel_size}; it must be at most the stage's world size {self.world_size} "
                "(tensor_parallel_size x cfg_parallel_size x context_parallel_size, or the hsdp sizes)",
            )

    @property
    def mesh(self) -> Mesh:
        """The ranks along each axis. HSDP by itself divides the rows of a step along the axis data."""
        data = self.shards * self.hsdp_replicate_size if self.use_hsdp and self._divided == 1 else 1
        return Mesh(data, self.cfg_parallel_size, self.context_parallel_size, self.tensor_parallel_size)

    @property
    def world_size(self) -> int:
        """All ranks, one GPU each."""
        return self.mesh.size

    @property
    def shards(self) -> int:
        """Ranks that hold a shard of the weights each: the effective hsdp_shard_size."""
        if not self.use_hsdp or self.hsdp_shard_size > 1 or self._divided == 1:
            return self.hsdp_shard_size
        return self._divided // self.hsdp_replicate_size

    @property
    def vae_use_tiling(self) -> bool:
        """Whether the sizes turn tiling on: VAE patch parallelism hands out tiles."""
        return self.vae_patch_parallel_size > 1

    def rank(self, index: int) -> Rank:
        """The rank of this index."""
        return self.mesh.rank(index)

    def check_model(self, llm: LlmConfig) -> None:
        """Raise ConfigError for a model that does not divide among the ranks."""
        self.rank(0).decoder(llm)

    def check_devices(self, count: int, where: str) -> None:
        """Raise ConfigError if there are fewer GPUs than ranks. where: says what shows so many."""
        if count < self.world_size:
            raise ConfigError(
                f"{self.world_size} ranks need a GPU each, and {where} {count}; choose smaller sizes, or list more GPUs"
            )

    def described(self) -> str:
        """All sizes in one line, for the log."""
        hsdp = f"{self.shards} x {self.hsdp_replicate_size}" if self.use_hsdp else "off"
        sizes = ("tensor", "cfg", "context", "vae_patch")
        told = [f"{size}_parallel_size {getattr(self, f'{size}_parallel_size')}" for size in sizes]
        return f"{', '.join(told)}, hsdp {hsdp}"

    @property
    def _divided(self) -> int:
        """Ranks that guidance and context make."""
        return self.cfg_parallel_size * self.context_parallel_size

    def _check_hsdp(self) -> None:
        replicas, ranks = self.hsdp_replicate_size, self._divided
        if self.tensor_parallel_size > 1:
            raise _wrong(
                "use_hsdp",
                f"is True with tensor_parallel_size {self.tensor_parallel_size}, and both divide the weights; "
                "leave one of them out",
            )
        if ranks == 1 and self.hsdp_shard_size < 2:
            raise _wrong("hsdp_shard_size", "is 1; use_hsdp shards over that many GPUs, it must be at least 2")
        if ranks > 1 and (self.shards < 2 or self.shards * replicas != ranks):
            raise _wrong(
                "hsdp_shard_size",
                f"is {self.hsdp_shard_size} and hsdp_replicate_size {replicas}; their product must be the {ranks} "
                "ranks of cfg_parallel_size x context_parallel_size, with shards of at least 2",
            )


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{key} {problem}", key)
