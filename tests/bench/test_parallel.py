"""`python -m bench parallel` on a CPU: results of real ranks, and ranks that fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.parallel.mesh import Mesh
from bench import __main__ as bench
from bench import parallel, parallel_pictures, parallel_ranks, parallel_steps
from bench.models import DIVISIBLE
from bench.parallel_lab import RankLab
from bench.parallel_ranks import Part
from bench.report import Table

CPU = torch.device("cpu")


def ends_in_an_exchange(lab: RankLab) -> Iterator[Table]:
    """Rank 0 waits for a rank that has been killed, as by a machine that is out of memory."""
    yield Table("parallel first", "before the failure", [{"verdict": "ok"}])
    if lab.groups.world.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    lab.all_true(True)


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_the_next_one_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = dict(parallel.plan(CPU, 2))
    broken = Part("links", Mesh(data=2), ends_in_an_exchange, 60)
    monkeypatch.setattr(parallel, "plan", lambda *_: {**real, "links": [broken]}.items())
    command = [
        "parallel",
        "--device",
        "cpu",
        "--ranks",
        "2",
        "--only",
        "links",
        "cfg",
        "--json",
        str(tmp_path / "rows"),
    ]
    assert bench.main(command) == 1
    printed = capfd.readouterr().out
    assert printed.index("== parallel first") < printed.index(
        "== parallel links FAILED: rank 1 ended with exit code -9"
    )
    first, *rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()][1:]
    assert first["table"] == "parallel first" and [row["side"] for row in rows] == [128, 64]
    for row in rows:
        assert row["table"] == "parallel cfg 2" and row["branches"] == 2 and row["ms"] is None
        assert row["verdict"] == "ok" and row["ranks_equal"] == "yes" and 0 <= row["error"] < 1e-5


def test_ranks_that_are_late_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_ranks, "CPU_LIMIT_S", 0.01)
    (table,) = parallel_ranks.run(Part("links", Mesh(data=2), parallel_steps.links, 60), "cpu")
    assert table.failed and table.note == "after 0.01 s not done: rank 0, 1"


def test_what_runs_on_so_many_ranks() -> None:
    names = {ranks: [each.name for _, parts in parallel.plan(CPU, ranks) for each in parts] for ranks in (2, 3, 4)}
    assert names[2] == ["links", "cfg 2", "context 2", "tensor 2", "hsdp 2", "vae 2"]
    assert names[3] == ["links", "cfg 3", "context 3", "tensor 2", "hsdp 3", "vae 3"]
    four = ["cfg 3", "context 4", "context 2 x cfg 2", "tensor 4", "hsdp 4", "hsdp 2 x 2", "vae 4"]
    assert names[4] == ["links", *four]
    assert list(parallel_pictures.ways(8)) == ["one GPU", "cfg 3", "context 8", "context 4 x cfg 2"]
    # The full model has 28 heads, which eight ranks do not divide.
    assert parallel.tensor_ranks(BAGEL_7B_MOT.llm, 8) == 4 and parallel.tensor_ranks(DIVISIBLE.llm, 8) == 8


def test_every_limit_is_of_a_part_that_there_is() -> None:
    names = {each.name for ranks in (2, 4, 8) for _, parts in parallel.plan(CPU, ranks) for each in parts}
    assert {mode for mode, _ in parallel_steps.LEAST_TIMES} | set(parallel_steps.MOST_WEIGHTS) <= names


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--device", "cpu", "--ranks", "1"], "--ranks is 1; several are compared with one, give 2 or more"),
        (["--device", "cpu", "--only", "cfgs"], "'cfgs' names no part; the parts are: links, cfg, context, mixed"),
        (["--device", "cpu", "--only", "mixed"], "--only mixed needs an even number of ranks from 4 on; --ranks is 2"),
        (["--device", "cpu", "--tiny"], "give --device cpu without --tiny"),
    ],
)
def test_what_cannot_run_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["parallel", *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "flags", "told"),
    [
        (0, [], "PyTorch sees no CUDA device; run this on two GPUs, or check the code with --device cpu"),
        (1, [], "PyTorch sees 1 GPU; run this on two or more, or check the code with --device cpu"),
        (2, ["--ranks", "4"], "--ranks is 4, and PyTorch sees 2 GPUs; give at most --ranks 2"),
        (2, ["--device", "cuda:1"], "--device is cuda:1; rank i takes GPU i, give --device cuda"),
    ],
)
def test_gpus_that_are_not_there_are_told(
    gpus: int, flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(bench, "machine", lambda _: {})
    assert bench.main(["parallel", *flags]) == 2
    assert told in capsys.readouterr().err


def test_ranks_belong_to_this_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["pull", "--ranks", "2"]) == 2
    assert "--ranks belongs to python -m bench parallel" in capsys.readouterr().err
