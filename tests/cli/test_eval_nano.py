"""`bagel eval-nano`: what it refuses, and a run through services of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bagel.cli import eval_nano, main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "zebra"], "'zebra' names no row; the rows are: one object, two objects"),
        (["--endpoint", "127.0.0.1:1", "--model", "m", "--topology", "bagel"], "leave out --model, --topology"),
        (["--count", "0"], "'0' is no whole number from 1 on"),
        (["--topology", "three"], "invalid choice: 'three'"),
        (["--model", "/no/such/folder"], "no checkpoint folder"),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval-nano", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_without_a_checkout_the_remedy_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eval_nano, "EVALUATE", "no_such_training.evaluate")
    assert main(["eval-nano"]) == 2
    assert "run this in a checkout of the repository" in capsys.readouterr().err


@pytest.mark.slow
def test_it_asks_services_of_its_own_and_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BAGEL_MODEL", raising=False)
    rows = ["--rows", "one object", "edits", "questions"]
    assert main(["eval-nano", "--seed", "9", "--count", "2", *rows, "--device", "cpu", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "95% interval" in out
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["seed"], found["model"], found["topology"]) == (9, "bagel-nano", "bagel")
    assert list(found["rows"]) == ["one object", "edits", "questions", "think: questions"]
    for name, row in found["rows"].items():
        assert row["count"] == 2
        assert row["right"] + len(row["wrong"]) == 2
        assert f"{name:<26} {row['right']:>4}/2" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 256
