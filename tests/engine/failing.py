"""Work that fails on a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from bagel.errors import InvalidRequest
from bagel.parallel.groups import Groups


def ends(groups: Groups, device: str) -> Iterator[None]:
    if groups.world.index:
        os._exit(3)
    groups.world.add_up(torch.zeros(1))
    yield None


def refuses(groups: Groups, device: str) -> Iterator[None]:
    yield None
    raise InvalidRequest("seed", "seed is wrong")
