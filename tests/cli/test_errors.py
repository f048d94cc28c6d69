"""What is wrong is told in one line, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bagel.cli import generate as command
from bagel.cli import main
from bagel.deployment import defaults
from tests.conftest import GOLDEN

MODEL = str(GOLDEN / "checkpoint")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with files that are wrong in some way; loading an engine is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAGEL_MODEL", MODEL)
    monkeypatch.setattr(command, "LOCAL_ENGINE", "tests.no_such_engine")
    (tmp_path / "empty.txt").write_text("\n \n\n")
    (tmp_path / "latin1.txt").write_bytes(b"a red cube\nun caf\xe9\n")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty_folder").mkdir()
    Image.new("L", (66_000, 1)).save(tmp_path / "long.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "odd.yaml").write_text("pipeline: bagel_single_stage\nstages: [{stage_id: 0, devises: '0'}]\n")
    (tmp_path / "two.yaml").write_text("pipeline: bagel_single_stage\nstages: [{stage_id: 0, devices: '0,1'}]\n")
    return tmp_path


P = ["--prompts", "x"]
WRONG: list[tuple[list[str], str]] = [
    ([], "there is no prompt; give --prompts"),
    (["--prompts"], "--prompts: expected at least one argument"),
    (["--prompts", "x", " "], "--prompts has an empty text"),
    (["--prompts", "a\udce9"], "is not UTF-8"),
    (["a red cube"], "'a red cube' belongs to no flag; a prompt goes behind --prompts"),
    (["--prompt", "x"], "did you mean --prompts?"),
    (["--txt-prompts", "none.txt"], "'none.txt' cannot be read"),
    (["--txt-prompts", "empty.txt"], "'empty.txt' has no prompt"),
    (["--txt-prompts", "latin1.txt"], "'latin1.txt' is not UTF-8 in line 2"),
    (["--txt-prompts", "empty_folder"], "'empty_folder' cannot be read"),
    ([*P, "--negative-prompt", ""], "--negative-prompt: it is empty"),
    ([*P, "--modality", "img2img"], "img2img needs an input image; give --image-path"),
    ([*P, "--modality", "img2text"], "img2text needs an input image"),
    ([*P, "--modality", "video"], "--modality: invalid choice: 'video'"),
    ([*P, "--image-path", "good.png"], "text2img reads no image"),
    ([*P, "--modality", "text2text", "--image-path", "good.png"], "text2text reads no image"),
    ([*P, "--modality", "img2img", "--image-path", "none.png"], "no file 'none.png'"),
    ([*P, "--modality", "img2img", "--image-path", "text.png"], "'text.png' is no intact"),
    ([*P, "--modality", "img2img", "--image-path", "long.png"], "'long.png' is 66000x1 pixels; scale it down"),
    ([*P, "--cfg-renorm-type", "local"], "--cfg-renorm-type: invalid choice: 'local'"),
    ([*P, "--steps", "1"], "steps is 1; it must be"),
    ([*P, "--steps", "many"], "--steps: 'many' is no whole number"),
    ([*P, "--height", "8"], "height is 8; it must be"),
    ([*P, "--seed", "-1"], "seed is -1; it must be"),
    ([*P, "--seed", "9" * 30], "it must be a whole number from 0"),
    ([*P, "--cfg-text-scale", "nan"], "--cfg-text-scale is nan; it must be a number from 0 to 100"),
    ([*P, "--cfg-img-scale", "inf"], "--cfg-img-scale is inf"),
    ([*P, "--cfg-interval", "0.9", "0.1"], "it must rise"),
    ([*P, "--cfg-interval", "0.9"], "--cfg-interval: expected 2 arguments"),
    ([*P, "--cfg-renorm-min", "x"], "--cfg-renorm-min: 'x' is no number"),
    ([*P, "--max-tokens", "0"], "--max-tokens is 0"),
    ([*P, "--model", "/no/such/folder"], "no checkpoint folder '/no/such/folder'"),
    ([*P, "--model", "empty_folder"], "config.json is missing"),
    ([*P, "--output", "good.png"], "--output 'good.png' cannot be written: it is a file"),
    ([*P, "--output", "good.png/pictures"], "cannot be written"),
    ([*P, "--output", ""], "--output: it is empty"),
    ([*P, "--device", "tpu"], "'tpu' is none of auto, cpu, cuda, cuda:N"),
    ([*P, "--deploy-config", "none.yaml"], "none.yaml cannot be read"),
    ([*P, "--deploy-config", "odd.yaml"], "did you mean devices?"),
    ([*P, "--deploy-config", "two.yaml"], "it must list a GPU for each rank of world size 1"),
    ([*P, "--init-timeout", "0"], "--init-timeout: '0' is no whole number of seconds from 1 on"),
    ([*P, "--batch-timeout", "-1"], "--batch-timeout: '-1' is no whole number of seconds from 1 on"),
    ([*P, "--cfg-parallel-size", "4"], "cfg_parallel_size is 4; it must be from 1 to 3"),
    ([*P, "--ray-address", "10.0.0.5:6379"], "with process as worker backend; it must be ray"),
    ([*P, "--worker-backend", "ray", "--ray-address", "ray://a:10001"], "it must be HOST:PORT as `ray start --head`"),
    ([*P, "--worker-backend", "ray", "--ray-address", "auto"], "--ray-address is 'auto'; it must be HOST:PORT"),
    ([*P, "--quantization", "int8"], "quantization is 'int8'; the DiT has fp8"),
    ([*P, "--endpoint", "localhost"], "'localhost' is no HOST:PORT"),
    (
        [*P, "--stage-configs-path", "x.yaml", "--num-inference-steps=20", "--omni", "--stesp", "9"],
        "unknown flag '--stage-configs-path'; give --deploy-config; unknown flag '--num-inference-steps=20'; "
        "give --steps; unknown flag '--omni'; bagel serve serves all stages by itself; leave it out; "
        "unknown flag '--stesp'; did you mean --steps?; see bagel generate --help",
    ),
    ([*P, "--vae-use-tiling"], "it is a key of the deploy file of --deploy-config"),
    (
        [*P, "--endpoint", "localhost:1", "--device", "cpu"],
        "a gateway that runs as it is; leave out --device",
    ),
    (
        [*P, "--endpoint", "localhost:1", "--quantization", "fp8", "--init-timeout", "9"],
        "--quantization, --init-timeout",
    ),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: " ".join(value) if value else "none")
def test_mistake_is_told_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bagel: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("argv", "hint"), [([], "bagel --help"), (["server"], "'server'"), (["--verbose"], "--verbose")]
)
def test_no_or_unknown_command(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert hint in err


def test_mistake_leaves_no_folder_behind(folder: Path) -> None:
    assert main(["generate", *P, "--output", "pictures", "--model", "/no/such/folder"]) == 2
    assert not (folder / "pictures").exists()


@pytest.mark.usefixtures("folder")
def test_install_without_engine_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *P]) == 2
    assert "pip install '.[engine]' in a checkout" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_no_model_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("BAGEL_MODEL")
    monkeypatch.setattr(defaults, "NANO_FOLDERS", (Path("/no/such/folder"),))
    assert main(["generate", *P]) == 2
    assert "use --model FOLDER, or set BAGEL_MODEL" in capsys.readouterr().err
