"""The model card says what the log and the evaluation say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from training.nano import card

LOG = (
    {"stage": "vae", "s": 30.0, "step": 100, "l1": 0.3},
    {"stage": "vae", "s": 60.0, "step": 200, "l1": 0.1},
    {"stage": "joint", "s": 0.0, "learned": 3_800_000, "device": "cpu"},
    {"stage": "joint", "s": 60.0, "step": 50, "draw_flow": 2.0, "see_text": 5.0},
    {"stage": "joint", "s": 30.0, "step": 60, "draw_flow": 0.2, "see_text": 0.01},
)


def test_minutes_go_on_over_the_stages() -> None:
    curves, starts = card.series(LOG)
    assert curves["l1"] == [(0.5, 0.3), (1.0, 0.1)]
    assert curves["draw_flow"] == [(2.0, 2.0), (2.5, 0.2)]
    assert starts == [1.0, 2.0]


def test_card_and_picture_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "run" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text('{"default_image_size": [128, 128]}')
    (checkpoint / "ema.safetensors").write_bytes(bytes(2_000_000))
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    rows = {"one object": {"right": 194, "count": 200, "interval": [0.9361, 0.9862], "goal": 0.97, "wrong": []}}
    (tmp_path / "results.json").write_text(json.dumps({"seed": 4, "steps": 50, "device": "cuda:0", "rows": rows}))
    more = {"two objects": {"right": 50, "count": 100, "interval": [0.4, 0.6], "goal": 0.92, "wrong": []}}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "results.json").write_text(json.dumps({"seed": 4, "steps": 50, "device": "cpu", "rows": more}))
    evaluations = [str(tmp_path / "more"), str(tmp_path)]
    assert card.main([str(tmp_path / "run"), *evaluations, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| one object | 194 of 200 | 97.0% | 93.6% to 98.6% | 97% |" in text
    assert text.index("| one object |") < text.index("| two objects | 50 of 100 |")
    assert "bagel eval-nano --seed 4`, in one process on cpu and cuda:0:" in text
    assert "1.0 M parameters" in text
    assert "| joint | cpu | 1.0 | 50 | 3.8 M |" in text and "| joint |  | 0.5 | 60 |  |" in text
    assert "- joint, 1.0 minutes: drawing: flow 2, answers: text 5\n" in text
    assert "- joint, 0.5 minutes: drawing: flow 0.2, answers: text 0.01\n" in text
    with Image.open(tmp_path / "out" / "training.png") as picture:
        assert len(picture.getcolors() or ()) > 5
    again = [str(tmp_path / "run"), *evaluations, "--out", str(tmp_path / "out")]
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(SystemExit):
        card.main(again)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert "would be overwritten; give --write" in capsys.readouterr().err
    assert card.main([*again, "--write"]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == text


def test_evaluations_of_other_weights_or_seeds_make_no_card() -> None:
    rows = {"one object": {"right": 1, "count": 2, "interval": [0.1, 0.9], "goal": 0.97, "wrong": []}}
    with pytest.raises(ValueError, match="differ"):
        card.merged([{"seed": 4, "steps": 50, "rows": rows}, {"seed": 5, "steps": 50, "rows": rows}])
