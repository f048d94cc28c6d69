"""HSDP: some ranks divide the weights among them, and gather each layer's before it runs.

A rank keeps a range of rows of every large weight. The next layer's weights are gathered while one computes, so that a
rank holds its share and a few layers. There are no gradients, so several copies of the weights (`hsdp_replicate_size`)
are several groups of ranks, which know nothing of each other here.

Torch's `fully_shard` gathers by collectives, wherever the ranks are: all run the same forwards in the same order,
whatever they compute in them. It copies a rank's rows into what is sent, and what came into the weights, with kernels:
on two H200s a quarter of a step of one branch. So ranks that can read each other's memory only divide the layers here
(`divide`), and copy what they lack themselves (bagel.model.divided).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bagel.parallel.groups import Group


def shard(units: Iterable[nn.Module], group: Group, device: torch.device, *, layers: nn.Module | None = None) -> None:
    """Divide the weights of modules among the ranks of a group; nothing in a group of one.

    units: modules of which each is gathered as a whole. layers: one more whose children are such units, and whose
    forward runs them in their order, each gathered while the one before it computes. The parameters may be on the meta
    device, and get memory with `to_empty`: each rank for its own rows alone.
    """
    if group.size == 1:
        return
    assert group.handle is not None
    mesh = DeviceMesh.from_group(group.handle, device.type)
    following = [] if layers is None else list(layers.children())
    units = [*following, *units]
    # Norms and biases are a thousandth of the weights, and often of another type: whole on every rank.
    small = {each for unit in units for each in unit.parameters() if each.dim() < 2}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    if layers is not None:
        # The root: its forward tells fully_shard where a pass begins and ends.
        fully_shard(layers, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    for layer, next_one in pairwise(following):
        assert isinstance(layer, FSDPModule) and isinstance(next_one, FSDPModule)
        layer.set_modules_to_forward_prefetch([next_one])


def divide(modules: Iterable[nn.Module], group: Group, device: torch.device) -> None:
    """Keep this rank's rows of every large weight of these modules, which are on the meta device; nobody gathers them.

    The ranks of the group call it at once. The parameters are no use for computing until something else takes their
    place.
    """
    assert group.handle is not None
    mesh = DeviceMesh.from_group(group.handle, device.type)
    for module in (each for root in modules for each in root.modules()):
        for name, whole in module.named_parameters(recurse=False):
            if whole.dim() < 2:
                continue
            mine = whole.new_empty((len(rows_of(group.index, group.size, len(whole))), *whole.shape[1:]))
            divided = DTensor.from_local(
                mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            setattr(module, name, nn.Parameter(divided, requires_grad=False))


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
    return rows_of(parameter.device_mesh.get_local_rank(), parameter.device_mesh.size(), len(parameter))


def rows_of(index: int, ranks: int, rows: int) -> range:
    """The rows of a weight that the rank of that index keeps, as torch.chunk divides.

    Equal shares but for the last ranks, which may have fewer rows or none.
    """
    most = -(-rows // ranks)
    return range(min(index * most, rows), min((index + 1) * most, rows))
