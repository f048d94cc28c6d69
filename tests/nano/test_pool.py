"""Examples that training keeps: the newest ones, each with all of its parts."""

from __future__ import annotations

import torch

from training.nano.pool import Pool


def _pool(slots: int) -> Pool:
    return Pool(slots, {"number": ((), torch.int64), "picture": ((2,), torch.float32)}, torch.device("cpu"))


def _put(pool: Pool, *numbers: int) -> None:
    values = torch.tensor(numbers)
    pool.put(number=values, picture=values[:, None].expand(-1, 2).float())


def test_only_what_was_put_is_taken() -> None:
    pool = _pool(8)
    _put(pool, 3, 4)
    assert set(pool.take(100)["number"].tolist()) == {3, 4}


def test_the_oldest_make_room() -> None:
    pool = _pool(4)
    for first in (1, 3, 5):
        _put(pool, first, first + 1)
    assert set(pool.take(200)["number"].tolist()) == {3, 4, 5, 6}


def test_parts_of_an_example_stay_together() -> None:
    pool = _pool(6)
    _put(pool, 1, 2, 3)
    _put(pool, 4, 5, 6)
    taken = pool.take(50)
    assert torch.equal(taken["picture"], taken["number"][:, None].expand(-1, 2).float())
