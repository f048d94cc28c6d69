"""A small model takes one thread of a CPU, unless the user says how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.roles import Role
from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.engine.loading import load_role
from bagel.engine.local import BagelEngine
from bagel.model.threads import settle_threads


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def load_engine() -> None:
    BagelEngine.load(find_model(NANO_NAME)[1])


def load_stage() -> None:
    load_role(find_model(NANO_NAME)[1], Role.CONTEXT, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("load", [load_engine, load_stage])
def test_the_shipped_model_takes_one_thread(load: Callable[[], None]) -> None:
    load()
    assert torch.get_num_threads() == 1


def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    load_stage()
    assert torch.get_num_threads() == 2


def test_a_large_model_and_a_gpu_leave_the_threads_alone() -> None:
    settle_threads(BAGEL_7B_MOT, "cpu")
    settle_threads(find_model(NANO_NAME)[1].config, "cuda:0")
    assert torch.get_num_threads() == 2
