"""Which device a name means, and which number type auto comes to there."""

from __future__ import annotations

import pytest
import torch

from bagel.errors import ConfigError
from bagel.model.device import choose_device, choose_dtype


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 2, "cuda:1"), ("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda:1"), ("cuda:0", 2, "cuda:0")],
)
def test_device_of_a_name(name: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert str(choose_device(name, gpu=1)) == expected


@pytest.mark.parametrize(("name", "gpus", "said"), [("cuda", 0, "--device cpu"), ("cuda:2", 2, "torch sees 0, 1")])
def test_device_that_is_not_there(name: str, gpus: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=said):
        choose_device(name)


def test_auto_is_bfloat16_on_a_gpu_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert [choose_dtype("auto", place) for place in (cpu, gpu)] == ["float32", "bfloat16"]
    assert [choose_dtype("float32", gpu), choose_dtype("bfloat16", cpu)] == ["float32", "bfloat16"]
