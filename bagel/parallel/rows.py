"""Which rows of a step each rank computes, and how all ranks come to have the velocities of all rows.

A row is one distinct branch of one picture. Guidance parallel divides the branches of few pictures this way, and HSDP
those of many. Context parallel does so too where it can: ranks that compute whole rows need no K/V of each other. Every
rank holds the contexts of all rows, so the division may differ from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from bagel.parallel.groups import Group

MOST_UNEVEN = 2048
"""Tokens of context of a row, by which ranks that compute whole rows may differ. One that waits for another with longer
contexts loses time: by reckoning, from 2,600 tokens on more than it takes the 7B to exchange the K/V of latents."""


def parts_of(contexts: Sequence[int], ranks: int) -> int:
    """Into how many parts to divide rows over ranks that may divide their latents as well; 1 leaves the rows whole.

    Parts have equally many rows, and each has equally many ranks, which divide the latents of its rows.
    """
    parts = gcd(len(contexts), ranks)
    sums = [sum(contexts[row] for row in share) for share in _shares(contexts, parts)]
    uneven = max(sums) - min(sums) > MOST_UNEVEN * (len(contexts) // parts)
    return 1 if uneven else parts


@dataclass(frozen=True)
class Division:
    """The rows of a step, divided over the ranks of a group. shares: by rank, the numbers of the rows it computes."""

    shares: tuple[tuple[int, ...], ...]
    group: Group

    @classmethod
    def of(cls, contexts: Sequence[int], group: Group, parts: int | None = None) -> Division:
        """Divide rows of equally many latents, which attend to contexts of so many tokens.

        Every rank gets one row more than another at most. Of fewer rows than ranks, the ranks left over compute some
        again: with HSDP, weights are gathered in forwards, so each rank must run one. parts: as many as there are
        ranks, or fewer, which equally many ranks that follow one another have then.
        """
        parts = parts or group.size
        shares = _shares(contexts, parts)[: len(contexts)]
        mine = (rank * parts // group.size for rank in range(group.size))
        return cls(tuple(shares[part % len(shares)] for part in mine), group)

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


def _shares(contexts: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """The rows of each part, in order, as a set of rows that is known has its layout and its graph already.

    Longest first, so that the short ones make up for the differences. All ranks must come to the same shares.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    for row in sorted(range(len(contexts)), key=lambda row: -contexts[row]):
        min(shares, key=lambda share: (len(share), sum(contexts[each] for each in share))).append(row)
    return [tuple(sorted(share)) for share in shares]
