"""Encoded examples that are drawn from more than once: a picture is encoded rarely, its noise is new every time."""

from __future__ import annotations

import torch
from torch import Tensor

Field = tuple[tuple[int, ...], torch.dtype]


class Pool:
    """A ring of examples on one device, each a row of every field; the host reads nothing, so that it can be captured.

    slots: examples kept, a multiple of what is put at once. fields: shape of a row and dtype, by name.
    """

    def __init__(self, slots: int, fields: dict[str, Field], device: torch.device) -> None:
        self.slots = slots
        self.rows = {
            name: torch.zeros(slots, *shape, dtype=dtype, device=device) for name, (shape, dtype) in fields.items()
        }
        self.put_so_far = torch.zeros((), dtype=torch.long, device=device)

    def put(self, **rows: Tensor) -> None:
        """Replace the oldest examples."""
        count = len(next(iter(rows.values())))
        where = (self.put_so_far + torch.arange(count, device=self.put_so_far.device)) % self.slots
        for name, values in rows.items():
            self.rows[name].index_copy_(0, where, values.to(self.rows[name].dtype))
        self.put_so_far += count

    def take(self, count: int) -> dict[str, Tensor]:
        """Random examples of those that are there."""
        there = self.put_so_far.clamp(max=self.slots)
        chosen = (torch.rand(count, device=there.device) * there).long().clamp(max=self.slots - 1)
        return {name: rows[chosen] for name, rows in self.rows.items()}
