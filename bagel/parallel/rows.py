"""Which rows of a step each rank computes, and how all ranks come to have the velocities of all rows.

A row is one distinct branch of one picture. Guidance parallel divides the branches of few pictures this way, and HSDP
those of many. Every rank holds the contexts of all rows, so the division may differ from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.parallel.groups import Group


@dataclass(frozen=True)
class Division:
    """The rows of a step, divided over the ranks of a group. shares: by rank, the numbers of the rows it computes."""

    shares: tuple[tuple[int, ...], ...]
    group: Group

    @classmethod
    def of(cls, contexts: Sequence[int], group: Group) -> Division:
        """Divide rows of equally many latents, which attend to contexts of so many tokens.

        Every rank gets one row more than another at most. Of fewer rows than ranks, the ranks left over compute some
        again: with HSDP, weights are gathered in forwards, so each rank must run one.
        """
        shares: list[list[int]] = [[] for _ in range(group.size)]
        # Longest first, so that the short ones make up for the differences. All ranks must come to the same division.
        for row in sorted(range(len(contexts)), key=lambda row: -contexts[row]):
            min(shares, key=lambda share: (len(share), sum(contexts[each] for each in share))).append(row)
        busy = min(len(contexts), group.size)
        # In order, as a set of rows that is known has its layout and its graph already.
        return cls(tuple(tuple(sorted(shares[rank % busy])) for rank in range(group.size)), group)

    @property
    def mine(self) -> tuple[int, ...]:
        """The rows that this rank computes."""
        return self.shares[self.group.index]

    def exchange(self, computed: Tensor) -> list[Tensor]:
        """This rank's results [rows of mine, ...] -> those of all rows in their order, the same on every rank."""
        most = max(map(len, self.shares))
        # Ranks exchange tensors of one shape; what is too much of it is never looked at.
        padding = computed.new_zeros(most - len(computed), *computed.shape[1:])
        gathered = self.group.gather(torch.cat((computed, padding)) if len(padding) else computed)
        # The first rank's, where several have computed a row: guidance needs the same bits everywhere.
        places = {
            row: (rank, at) for rank, share in reversed([*enumerate(self.shares)]) for at, row in enumerate(share)
        }
        return [gathered[places[row]] for row in range(len(places))]
