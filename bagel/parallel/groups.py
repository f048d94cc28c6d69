"""The ranks that one process exchanges tensors with, by axis of the mesh (`torch.distributed`).

Every rank calls the same exchanges of a group in the same order; who leaves one out makes the others wait. Ranks
exchange through NCCL where the model is on a GPU, through gloo on a CPU.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bagel.parallel.mesh import Mesh, Rank

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
# PyTorch 2.13 has it under a new name, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Group:
    """Some ranks of the mesh; index: this one's place among them. A group of one exchanges nothing."""

    index: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same on every rank; written into x, which is returned."""
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def begin_add_up(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to `add_up`; the function that is returned waits for the result, and must be called once.

        On a GPU the device's stream waits, not the host. Nothing may read or write x until then.
        """
        if self.size == 1:
            return lambda: x
        work = dist.all_reduce(x, group=self.handle, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return x

        return wait

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tensors of one shape, in the order of the ranks: [...] -> [size, ...]."""
        return self.begin_gather(x)()

    def begin_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to `gather`; the function that is returned waits for the result, and must be called once.

        On a GPU the device's stream waits, not the host. x must stay as it is until then.
        """
        if self.size == 1:
            return lambda: x[None]
        gathered = x.new_empty(self.size * x.numel())
        # Flat, as gloo takes no other shape than the ranks' tensors one behind the other. Both tensors live until the
        # wait, as PyTorch keeps them for a work that is under way.
        work = _all_gather(gathered, x.flatten(), group=self.handle, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return gathered.view(self.size, *x.shape)

        return wait

    def collect(self, x: Tensor) -> Tensor | None:
        """As `gather`, on the rank of index 0 alone; None on the others."""
        if self.size == 1:
            return x[None]
        if self.index:
            dist.gather(x, group=self.handle, group_dst=0)
            return None
        collected = x.new_empty(self.size, *x.shape)
        dist.gather(x, list(collected), group=self.handle, group_dst=0)
        return collected

    def share(self, x: Tensor, source: int = 0) -> Tensor:
        """The tensor of the rank of index `source`, on every rank; written into x, contiguous, which is returned."""
        if self.size > 1:
            dist.broadcast(x, group=self.handle, group_src=source)
        return x


ALONE = Group()
"""The group of a rank that shares its work with no other."""


@dataclass(frozen=True)
class Groups:
    """A rank's groups. Without torch.distributed, those of a mesh of size one.

    tp: ranks that divide each layer; context: those that divide the latents of each row, or the rows and then, by the
    number of its parts, those of context_parts the latents; rows: those that divide the rows of a step, along data and
    cfg; world: all. weights: those that divide the weights. vae_decode, vae_encode: those that divide the tiles of
    pictures, by a group for each thread that runs the autoencoder, so that decoding goes on beside steps.
    """

    rank: Rank = field(default_factory=Rank)
    tp: Group = Group()
    context: Group = Group()
    rows: Group = Group()
    world: Group = Group()
    weights: Group = Group()
    vae_decode: Group = Group()
    vae_encode: Group = Group()
    context_parts: Mapping[int, Group] = field(default_factory=lambda: {1: ALONE})


UNDIVIDED = Groups()
"""The groups of the rank that computes everything."""


def join(
    rank: Rank,
    device: torch.device,
    init_method: str,
    *,
    timeout_s: float,
    vae_ranks: int = 1,
    weight_ranks: int = 1,
) -> Groups:
    """Meet all ranks of the mesh, and form the groups; called once in a process, by all of them.

    init_method: as torch.distributed has it, like tcp://127.0.0.1:29500. timeout_s: of an exchange that another rank
    does not come to. vae_ranks: so many ranks, from the first on, divide the tiles of pictures; weight_ranks: so many
    that follow one another divide the weights.
    """
    mesh = rank.mesh
    if mesh.size == 1:
        return Groups(rank)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where PyTorch's exchanges of objects, and fully_shard, put what they make
    if init_method.startswith("file:") and sys.platform == "linux":
        # Ranks of one host; otherwise gloo looks up the host's name, which may have no address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        BACKENDS[device.type],
        init_method=init_method,
        rank=rank.index,
        world_size=mesh.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )

    def form(members: Sequence[Sequence[Rank]]) -> Group:
        """This rank's group of these, which all ranks form in the same order."""
        mine = Group()
        for ranks in members:
            indices = [each.index for each in ranks]
            if len(indices) == 1:
                continue
            handle = dist.new_group(indices, timeout=timeout)
            if rank.index in indices:
                mine = Group(indices.index(rank.index), len(indices), handle)
        return mine

    ranks = [mesh.rank(index) for index in range(mesh.size)]
    context_parts = {
        parts: form([each for line in _along(mesh, "context") for each in _divided(line, parts)])
        for parts in range(1, mesh.context + 1)
        if mesh.context % parts == 0
    }
    return Groups(
        rank,
        tp=form(_along(mesh, "tp")),
        context=context_parts[1],
        context_parts=context_parts,
        rows=form(_along(mesh, "data", "cfg")),
        world=Group(rank.index, mesh.size, dist.group.WORLD),
        weights=form(_divided(ranks, mesh.size // weight_ranks)),
        vae_decode=form([ranks[:vae_ranks]]),
        vae_encode=form([ranks[:vae_ranks]]),
    )


def leave() -> None:
    """Take leave of all groups; nothing in a process that is in none.

    What captured their exchanges, as the CUDA graphs of a model, must be let go before: NCCL waits until it is.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def _divided(ranks: Sequence[Rank], parts: int) -> list[Sequence[Rank]]:
    """Ranks in so many parts, of as many neighbours each."""
    each = len(ranks) // parts
    return [ranks[at : at + each] for at in range(0, len(ranks), each)]


def _along(mesh: Mesh, *axes: str) -> list[list[Rank]]:
    """The mesh's ranks in lists of those that differ along these axes alone."""
    lists: dict[tuple[int, ...], list[Rank]] = {}
    others = [axis for axis in ("data", "cfg", "context", "tp") if axis not in axes]
    for index in range(mesh.size):
        rank = mesh.rank(index)
        lists.setdefault(tuple(getattr(rank, axis) for axis in others), []).append(rank)
    return list(lists.values())
