"""Work on several ranks, one of which fails while the others wait for it."""

from __future__ import annotations

import multiprocessing

import pytest

from bagel.engine.on_ranks import _answers, on_ranks
from bagel.errors import InvalidRequest, RunnerDied
from bagel.parallel.config import ParallelConfig
from tests.engine import failing


@pytest.mark.slow
def test_a_rank_that_ends_ends_the_others() -> None:
    with pytest.raises(RunnerDied, match="rank 1 ended early"):
        list(on_ranks(ParallelConfig(tensor_parallel_size=2), "cpu", failing.ends))


@pytest.mark.slow
def test_what_a_rank_refuses_is_raised_here() -> None:
    with pytest.raises(InvalidRequest, match="seed is wrong"):
        list(on_ranks(ParallelConfig(), "cpu", failing.refuses))


def test_any_other_error_names_its_rank() -> None:
    (ours, theirs), (other, _) = multiprocessing.Pipe(), multiprocessing.Pipe()
    theirs.send(("error", "ValueError: no luck"))
    with pytest.raises(RunnerDied, match="rank 1 failed: ValueError: no luck"):
        list(_answers([other, ours]))


def test_a_rank_that_has_ended_is_the_cause_of_what_fails_with_it() -> None:
    (ours, theirs), (other, others) = multiprocessing.Pipe(), multiprocessing.Pipe()
    theirs.send(("error", "RuntimeError: Connection reset by peer"))
    others.close()
    with pytest.raises(RunnerDied, match="rank 1 ended early"):
        list(_answers([ours, other]))
