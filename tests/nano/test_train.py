"""Every stage of training runs from end to end, and what it leaves is a checkpoint that serves."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bagel.checkpoint.files import EMA
from bagel.cli import main as bagel
from bagel.model.tokenizer import BagelTokenizer
from training.nano import evaluate, recipe, train
from training.nano.batches import LAYOUTS, encode_example
from training.nano.examples import Example
from training.nano.optim import FlatOptimizer, Rates
from training.nano.rows import ROWS, answered, cases
from training.nano.tasks import GROUPS, drop

pytestmark = pytest.mark.slow

LATENT = ("vae2llm", "llm2vae", "time_embedder")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny = ["--tiny", "--device", "cpu", "--workers", "0"]
    assert recipe.main([str(folder), "--share", "0.007", *tiny]) == 0
    return folder


def test_a_later_stage_goes_on_from_the_one_before(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    saved = [line["saved"] for line in lines if "saved" in line]
    resumed = [line["resumed"] for line in lines if "resumed" in line]
    assert resumed == [saved[0]]
    assert saved[-1] > saved[0] > 0
    assert [line["skipped"] for line in lines if "skipped" in line][-1] == 0


def test_a_stage_that_fails_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert recipe.main([str(tmp_path), "--share", "0.007", "--from", "2", "--device", "cpu"]) != 0
    assert capfd.readouterr().err.count("Traceback") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_must_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["vae", "--run", str(tmp_path), "--minutes", "3.7"])
    assert "torch sees no GPU" in (err := capsys.readouterr().err) and "give --device cpu" in err


def test_the_generation_expert_alone_can_go_on_and_texts_stay_what_they_are(run: Path, tmp_path: Path) -> None:
    copytree(run / "checkpoint", tmp_path / "checkpoint")
    tiny = ["--tiny", "--device", "cpu", "--workers", "0"]
    more = ["--groups", "draw=2", "edit=1", "--expert", "generation"]
    assert train.main(["joint", "--run", str(tmp_path), "--minutes", "0.05", *tiny, *more]) == 0
    before, after = (load_file(folder / "checkpoint" / EMA) for folder in (run, tmp_path))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any("_moe_gen" in name for name in changed)
    assert [name for name in changed if "moe_gen" not in name and not name.startswith(LATENT)] == []


def test_the_checkpoint_serves(run: Path, tmp_path: Path) -> None:
    model = str(run / "checkpoint")
    assert (
        bagel(["generate", "--model", model, "--prompts", "a red circle", "--steps", "3", "--output", str(tmp_path)])
        == 0
    )
    assert list(tmp_path.glob("*.png"))


def test_the_evaluation_leaves_a_table_and_a_sheet(run: Path, tmp_path: Path) -> None:
    model = str(run / "checkpoint")
    arguments = ["--model", model, "--count", "1", "--steps", "2", "--out", str(tmp_path), "--rows", "one,edit,text"]
    assert evaluate.main(arguments) == 0
    assert (tmp_path / "sheet.png").is_file()
    assert "one object" in (tmp_path / "table.txt").read_text()


def test_true_answers_are_right_and_others_wrong() -> None:
    for row in ROWS:
        for case in cases(row, 3, 20, 10):
            if case.example.target is None:
                assert answered(case.example, f"<think> so. </think> {case.example.answer}")
                assert not answered(case.example, "a large red moon.")


def test_descriptions_are_compared_by_their_objects() -> None:
    example = Example("describe", ("?",), answer="a large cyan star and an orange heart on a grey background.")
    assert answered(example, "an orange heart and a small cyan star.")
    assert not answered(example, "a large cyan star on a grey background.")
    assert not answered(example, "a large cyan star and a red heart on a grey background.")


def test_texts_fit_and_every_branch_is_trained(run: Path) -> None:
    tokenizer, rng = BagelTokenizer(run / "checkpoint"), Random(2)
    for name, make in GROUPS.items():
        examples = [drop(rng, make(rng)) for _ in range(400)]
        fitting = sum(encode_example(tokenizer, LAYOUTS[name], each) is not None for each in examples)
        assert fitting >= 390
        kinds = {(bool(each.texts), each.source is not None, each.answer is not None) for each in examples}
        if name == "edit":
            assert kinds == {(True, True, False), (False, True, False), (True, False, False), (False, False, False)}
        if name == "draw":
            assert kinds == {(True, False, False), (False, False, False)}


def test_the_optimizer_learns_and_skips_what_is_not_finite() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    named = [(f"a.layers.{name}", p) for name, p in net.named_parameters()]
    optimizer = FlatOptimizer(named, Rates(muon=0.02, adam=0.02))
    x = torch.randn(256, 8)
    y = x[:, :1] * x[:, 1:2]

    def loss() -> torch.Tensor:
        error: torch.Tensor = net(x) - y
        return error.square().mean()

    first = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.3 * first
    before = optimizer.flat.clone()
    optimizer.grad.fill_(float("nan"))
    optimizer.step()
    assert torch.equal(optimizer.flat, before)
    assert float(optimizer.skipped) == 1
