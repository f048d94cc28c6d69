"""HSDP: some ranks divide the weights among them, and gather each layer's before it runs (torch's `fully_shard`).

A rank keeps a range of rows of every large weight. The next layer's weights are gathered while one computes, and those
of a layer are given back after it, so that a rank holds its share and about four layers. Ranks must run the same
forwards in the same order, whatever they compute in them. There are no gradients, so several copies of the weights
(`hsdp_replicate_size`) are several groups of ranks, which know nothing of each other here.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bagel.parallel.groups import Group


def shard(layers: nn.Module, others: Iterable[nn.Module], group: Group, device: torch.device) -> None:
    """Divide the weights of these modules among the ranks of a group; nothing in a group of one.

    layers: its children are the layers, each of them a unit, and its forward runs them in their order. others: units
    that run outside of it. The parameters may be on the meta device, and get memory with `to_empty`: each rank for its
    own rows alone.
    """
    if group.size == 1:
        return
    assert group.handle is not None
    mesh = DeviceMesh.from_group(group.handle, device.type)
    units = [*layers.children(), *others]
    # Norms and biases are a thousandth of the weights, and often of another type: whole on every rank.
    small = {each for unit in units for each in unit.parameters() if each.dim() < 2}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    # The root: its forward tells fully_shard where a pass begins and ends.
    fully_shard(layers, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    for layer, following in pairwise(layers.children()):
        assert isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)
        layer.set_modules_to_forward_prefetch([following])


def gather_once(units: Iterable[nn.Module]) -> None:
    """Gather the weights of each unit and give them back; all ranks do so, once they have memory.

    What is gathered into is made here, outside of inference mode: made in it, it could not be written outside of it.
    """
    with torch.inference_mode(False):
        for unit in units:
            if isinstance(unit, FSDPModule):
                unit.unshard()
                unit.reshard()


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its rows of one that is divided, else all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: Tensor) -> range:
    """The rows of a parameter that `local` has."""
    if not isinstance(parameter, DTensor):
        return range(len(parameter))
    # As torch.chunk divides: equal shares but for the last ranks, which may have fewer rows or none.
    most = -(-len(parameter) // parameter.device_mesh.size())
    begin = min(parameter.device_mesh.get_local_rank() * most, len(parameter))
    return range(begin, begin + len(local(parameter)))
