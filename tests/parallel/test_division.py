"""Which rank computes which rows of a step."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bagel.parallel.groups import Group
from bagel.parallel.rows import MOST_UNEVEN, Division, parts_of

CONTEXTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=12)


@given(CONTEXTS, st.integers(1, 8))
def test_every_row_has_a_rank_and_no_rank_is_without_a_row(contexts: list[int], ranks: int) -> None:
    shares = Division.of(contexts, Group(0, ranks)).shares
    assert len(shares) == ranks
    assert all(shares)
    assert {row for share in shares for row in share} == set(range(len(contexts)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    # None twice, but where ranks have nothing else to do.
    assert sum(sizes) == max(len(contexts), ranks)


@given(CONTEXTS, st.integers(1, 8))
def test_all_ranks_divide_alike_and_keep_the_order_of_rows(contexts: list[int], ranks: int) -> None:
    shares = Division.of(contexts, Group(0, ranks)).shares
    assert all(Division.of(contexts, Group(rank, ranks)).shares == shares for rank in range(ranks))
    assert all(list(share) == sorted(share) for share in shares)


def test_long_contexts_are_spread() -> None:
    assert Division.of([10, 5000, 20, 4000], Group(0, 2)).shares == ((0, 1), (2, 3))
    assert Division.of([5000, 20, 4000], Group(0, 2)).shares == ((0,), (1, 2))


@given(CONTEXTS, st.integers(1, 8))
def test_ranks_that_may_divide_latents_have_equally_many_rows(contexts: list[int], ranks: int) -> None:
    parts = parts_of(contexts, ranks)
    division = Division.of(contexts, Group(0, ranks), parts)
    each = ranks // parts
    assert ranks % parts == 0 and {len(share) for share in division.shares} == {len(contexts) // parts}
    assert [share for share in division.shares[::each] for _ in range(each)] == list(division.shares)
    assert {row for share in division.shares for row in share} == set(range(len(contexts)))


def test_rows_are_divided_only_where_no_rank_waits_long() -> None:
    assert parts_of([50, 20], 2) == parts_of([50, 20], 4) == 2
    assert parts_of([50, 20, 20], 2) == 1 and parts_of([50, 20, 20], 3) == 3
    assert parts_of([9000, 9000 - MOST_UNEVEN], 2) == 2
    assert parts_of([9000, 9000 - MOST_UNEVEN - 1], 2) == 1
    # Of two pictures, a long and a short context make up for another pair.
    assert parts_of([9000, 20, 9000, 20], 2) == 2


def test_one_rank_exchanges_nothing() -> None:
    computed = torch.arange(6.0).view(3, 2)
    division = Division.of([1, 2, 3], Group())
    assert division.mine == (0, 1, 2)
    exchanged = division.exchange(computed)
    assert [each.data_ptr() for each in exchanged] == [row.data_ptr() for row in computed]
