"""Memory of the other ranks of a group, read where it lies: of GPUs over their links, of processes of one host.

A rank offers tensors that it never changes again, and reads those of the others by copies of its own, when it wants
them: no rank waits for another, and between GPUs the copy engines do the work. Ranks that cannot read each other's
memory, as on two hosts, gather by collectives (bagel.parallel.hsdp).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from bagel.parallel.groups import Group

T = TypeVar("T")
_DEVICE = 6
"""The argument of PyTorch's `rebuild_cuda_tensor` that says on which device the memory is opened."""


def readable(group: Group, device: torch.device) -> bool:
    """Whether all ranks of a group can read each other's memory; all call it at once, on their devices."""
    if group.size == 1:
        return False
    mine = torch.randint(2**62, (1,)).to(device)
    found = _exchange(group, mine)
    values = _told(group, int(mine))
    right = found is not None and [int(each) for each in found] == values
    return all(_told(group, right))


def exchange(group: Group, mine: Tensor) -> list[Tensor]:
    """Every rank's tensor, in the order of the ranks; all call it at once, and none writes to its own any more.

    A rank's own is the same values, perhaps at another place: what was passed in is no longer needed. The tensors may
    have different sizes, and one type. For ranks whose memory is `readable`.
    """
    found = _exchange(group, mine)
    if found is None:
        raise RuntimeError("a rank's memory cannot be read by the others any more; start the service again")
    return found


def _exchange(group: Group, mine: Tensor) -> list[Tensor] | None:
    """As `exchange`; None on all ranks if one of them fails."""
    offer, accept = (_offer_gpu, _accept_gpu) if mine.is_cuda else (_offer_cpu, _accept_cpu)
    offered, here = _unless_it_fails(lambda: offer(mine)), _host(mine)
    offers: list[Any] = _told(group, None if offered is None else (here, offered[1]))
    found: list[Tensor] | None = None
    if offered is not None and all(each is not None and each[0] == here for each in offers):
        ours, others = offered[0], [each[1] for each in offers]
        found = _unless_it_fails(
            lambda: [ours if rank == group.index else accept(each, mine.device) for rank, each in enumerate(others)]
        )
    everywhere = all(_told(group, found is not None))
    if offered is not None and not mine.is_cuda:
        os.close(offered[1][1])  # all have opened it
    return found if everywhere else None


def _told(group: Group, mine: T) -> list[T]:
    """What each rank says, in the order of the ranks."""
    said: list[Any] = [None] * group.size
    dist.all_gather_object(said, mine, group=group.handle)
    return said


def _unless_it_fails(work: Callable[[], T]) -> T | None:
    # Whatever it is: another rank must hear of it, and does something else then.
    try:
        return work()
    except (RuntimeError, OSError, ValueError, AttributeError):
        return None


def _host(x: Tensor) -> tuple[str, str]:
    """Ranks for which it is equal may be able to read each other's memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot, "" if x.is_cuda else os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", str(os.getpid())  # equal to nobody's


# CUDA's handles of memory, as PyTorch passes them between processes


def _offer_gpu(mine: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    torch.cuda.synchronize(mine.device)
    return mine, reduce_tensor(mine)[1]


def _accept_gpu(offered: tuple[Any, ...], device: torch.device) -> Tensor:
    # Opened on this rank's device, which reads the other one's memory over their link.
    opened: Tensor = rebuild_cuda_tensor(*(device.index if at == _DEVICE else each for at, each in enumerate(offered)))
    return opened


# Memory of processes, in files without names


def _offer_cpu(mine: Tensor) -> tuple[Tensor, tuple[int, int, Any, int]]:
    fd = os.memfd_create("bagel-weights")
    os.ftruncate(fd, max(mine.nbytes, 1))
    shared = _mapped(fd, mine.dtype, mine.numel())
    shared.copy_(mine)
    return shared, (os.getpid(), fd, mine.dtype, mine.numel())


def _accept_cpu(offered: tuple[int, int, Any, int], device: torch.device) -> Tensor:
    pid, fd, dtype, elements = offered
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        return _mapped(opened, dtype, elements)
    finally:
        os.close(opened)


def _mapped(fd: int, dtype: torch.dtype, elements: int) -> Tensor:
    nbytes = elements * dtype.itemsize
    return torch.frombuffer(mmap.mmap(fd, max(nbytes, 1)), dtype=dtype, count=elements)
