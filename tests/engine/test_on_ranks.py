"""Work on several ranks, one of which fails while the others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from bagel.engine.on_ranks import on_ranks
from bagel.errors import InvalidRequest, RunnerDied
from bagel.parallel.config import ParallelConfig
from tests.engine import failing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (failing.ends, RunnerDied, "rank 1 ended early"),
        (failing.raises, RunnerDied, "rank 1 failed: ValueError: no luck"),
        (failing.refuses, InvalidRequest, "seed is wrong"),
    ],
)
def test_a_rank_that_fails_ends_the_others(
    work: Callable[..., Iterator[None]], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        list(on_ranks(ParallelConfig(tensor_parallel_size=2), "cpu", work))
