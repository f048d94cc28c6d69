"""A pool of encoded examples, each used several times: encoding a picture is slow, and only its noise must be new."""

from __future__ import annotations

import torch
from torch import Tensor

Field = tuple[tuple[int, ...], torch.dtype]


class Pool:
    """A ring of examples on one device, each a row of every field. The host reads nothing, so a graph can capture it.

    slots: the capacity, a multiple of the examples per `put`. fields: the shape of a row and its dtype, by name.
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
        """Draw examples at random from those in the pool."""
        there = self.put_so_far.clamp(max=self.slots)
        # clamp: rand is below 1, but its product with a large count can round up to the count.
        chosen = (torch.rand(count, device=there.device) * there).long().clamp(max=self.slots - 1)
        return {name: rows[chosen] for name, rows in self.rows.items()}
