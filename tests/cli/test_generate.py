"""`bagel generate` from end to end on the tiny checkpoint: real processes, real pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bagel.checkpoint.files import Checkpoint
from bagel.cli import main
from bagel.engine.local import BagelEngine
from bagel.engine.sampler import Canvas
from bagel.images import read_settings
from bagel.prompts import TextPart
from bagel.request import Modality, resolve
from tests.conftest import GOLDEN
from tests.deployment.test_deploy_file import parse_deploy_config
from tests.helpers import agree

ROOT = Path(__file__).parents[2]
MODEL = str(GOLDEN / "checkpoint")
SMALL = "--height 64 --width 96 --steps 4 --seed 3".split()


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAGEL_MODEL", MODEL)
    monkeypatch.chdir(tmp_path)


def stage(**settings: object) -> object:
    return parse_deploy_config({"pipeline": "bagel_single_stage", "stages": [{"stage_id": 0, **settings}]}).stages[0]


@pytest.mark.slow
def test_process_draws_what_the_engine_draws(engine: BagelEngine, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bagel.cli",
        "generate",
        "--prompts",
        "a red cube",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run([*command, *SMALL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.removesuffix("\n"))
    options = {"height": 64, "width": 96, "steps": 4, "seed": 3}
    (expected,) = engine.generate([resolve(Modality.TEXT2IMG, (TextPart("a red cube"),), options)])
    assert expected.image is not None
    with Image.open(path) as picture:
        assert agree(picture, expected.image)
    assert read_settings(path)["model"] == Path(MODEL).name
    assert "bagel-nano" not in done.stderr
    assert "Warning" not in done.stderr


def test_seed_makes_a_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["generate", "--prompts", "cube", "--think", "--max-think-tokens", "6", *SMALL]) == 0
    first, second = (np.asarray(Image.open(tmp_path / f"cube_seed3{suffix}.png")) for suffix in ("", "-2"))
    assert np.array_equal(first, second)


@pytest.mark.slow
def test_edit_has_the_resized_inputs_size(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save("in.png")
    edit = ["--modality", "img2img", "--image-path", "in.png", "--prompts", "snow", "--steps", "2", "--seed", "1"]
    assert main(["generate", *edit]) == 0
    with Image.open(tmp_path / "snow_seed1.png") as picture:
        assert picture.size == (512, 512)


@pytest.mark.parametrize("modality", ["text2text", "img2text"])
def test_answers(modality: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "red").save("in.png")
    image = ["--image-path", "in.png"] if modality == "img2text" else []
    ask = ["--modality", modality, *image, "--prompts", "How many squares can you see?", "--max-tokens", "9"]
    assert main(["generate", *ask, "--log-stats"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert out.strip()
    assert re.search(r"^request  prefill s  tokens  tokens/s  first text s  total s  prompt$", err, re.MULTILINE)
    assert re.search(r"^ +1 +[0-9.]+ +9 +[0-9.]+ +[0-9.]+ +[0-9.]+  How many squares", err, re.MULTILINE)


@pytest.mark.parametrize(("flag", "value"), [("--height", "1040"), ("--width", "100000")])
def test_picture_above_the_models_size_is_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompts", "x", flag, value]) == 2
    assert f"{flag[2:]} is {value}; this model draws 16 to 1024 pixels a side" in capsys.readouterr().err


def test_max_model_len_of_the_deploy_file_holds(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.yaml").write_text("pipeline: bagel_single_stage\nstages: [{stage_id: 0, max_model_len: 40}]\n")
    ask = ["--modality", "text2text", "--prompts", "hi", "--deploy-config", "d.yaml", "--max-tokens"]
    assert main(["generate", *ask, "400"]) == 2
    assert "the limit is 40" in capsys.readouterr().err
    assert main(["generate", *ask, "4"]) == 0


def test_stage_settings_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from bagel.engine import local

    seen: dict[str, object] = {}
    monkeypatch.setattr(BagelEngine, "load", lambda checkpoint, **settings: seen.update(settings))
    local.load(
        Checkpoint(Path(MODEL)),
        stage(  # type: ignore[arg-type]
            max_num_seqs=2, max_model_len=77, vae_use_tiling=True, attention_backend="sdpa", enforce_eager=True
        ),
        device="cpu",
    )
    assert (seen["device"], seen["dtype"]) == (torch.device("cpu"), torch.float32)
    assert (seen["max_num_seqs"], seen["max_model_len"], seen["vae_use_tiling"]) == (2, 77, True)
    assert (seen["attention_backend"], seen["enforce_eager"]) == ("sdpa", True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory.\nTried to allocate 20 GiB."),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 12 bytes."),
    ],
)
def test_full_memory_is_one_line(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise kind(message)

    monkeypatch.setattr(Canvas, "step", full)
    assert main(["generate", "--prompts", "x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("bagel: error: the memory of the device is full; ")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Canvas, "step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["generate", "--prompts", "x"])


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BAGEL_MODEL"}
    command = [sys.executable, "-m", "examples.demo", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"The contact sheet: {tmp_path / 'sheet.png'}" in done.stdout
    assert "bagel-nano is served at 127.0.0.1:" in done.stdout
    assert done.stdout.count("  describe the image -> ") == 4
    assert done.stdout.count("-> <think> ") == 2
    names = {path.stem.split("-")[0] for path in tmp_path.glob("*.png")}
    assert names == {"picture", "edit", "think", "sheet"}
