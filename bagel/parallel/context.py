"""Context parallel: the latents of each row are divided over ranks, which gather their K/V in every layer.

Each rank computes as many latents of a row, its padding included, and attends with them to all of the row. So every
rank's slab holds the K/V of whole rows; contexts and delimiters are computed by all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bagel.parallel.groups import ALONE, Group

Kv = tuple[Tensor, Tensor]
"""K and V of one layer, each [tokens, kv_heads, head_dim]."""
WriteKv = Callable[[Kv, Tensor], None]
"""Writes the K/V of a rank's latents to the given tensors, at the given places."""


def shard(x: Tensor, group: Group) -> Tensor:
    """This rank's latents of x, [rows, latents, ...] -> [rows, latents / ranks, ...], a view."""
    mine: Tensor = x.unflatten(1, (group.size, -1))[:, group.index]
    return mine


def whole(x: Tensor, group: Group) -> Tensor:
    """The inverse of `shard`, which all ranks call with theirs."""
    return group.gather(x).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class LatentKv:
    """Where the K/V of a forward's latents lie, and the ranks that compute them.

    slots: their places in the slab, [rows * latents] int64, those of each rank's latents behind the rank's before.
    """

    slots: Tensor
    group: Group = ALONE

    @classmethod
    def divided(cls, slots: Tensor, group: Group) -> LatentKv:
        """slots [rows, latents], of rows that are divided over a group as `shard` does."""
        return cls(slots.unflatten(1, (group.size, -1)).transpose(0, 1).flatten(), group)

    def write(self, kv: Kv, write: WriteKv) -> Callable[[], None]:
        """Bring the latents' K/V of all ranks to one layer's slab, kv; the function that is returned ends this.

        Between the two calls the ranks' K/V are on their way: what does not attend to them may be computed then.
        """
        # K and V of a token side by side, so that one exchange brings both: V is K's tensor from its second place on.
        mine = kv[0].new_empty(2 * len(self.own_slots), *kv[0].shape[1:])
        write((mine, mine[1:]), self.own_slots)
        arrived = self.group.begin_gather(mine)

        def finish() -> None:
            gathered = arrived().view(-1, 2, *mine.shape[1:])
            for slab, which in zip(kv, (0, 1), strict=True):
                slab.index_copy_(0, self.slots, gathered[:, which])

        return finish

    @cached_property
    def own_slots(self) -> Tensor:
        """Places of K, every other one, in what a rank sends."""
        return torch.arange(0, 2 * len(self.slots) // self.group.size, 2, device=self.slots.device)
