"""`bagel verify`: what a checkpoint holds, compared between hosts, and which services would load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel.checkpoint.files import EMA, Checkpoint
from bagel.cli import main
from tests.conftest import GOLDEN

Captured = pytest.CaptureFixture[str]
ROLES = ["understand", "context", "denoise", "full"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "model"))


def report(capsys: Captured, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["verify", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    return found


def change(model: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(model / EMA), **tensors}, model / EMA)


def test_a_good_model_says_the_same_everywhere(model: Path, checkpoint: Checkpoint, capsys: Captured) -> None:
    found = report(capsys, str(model))
    assert found["fingerprint"] == checkpoint.fingerprint.hex()
    assert list(found["services"]) == ROLES and all(each["accepts"] for each in found["services"].values())
    assert found["files"][EMA]["tensors"] == {"BF16": 167}
    assert found == report(capsys, str(checkpoint.folder))
    assert main(["verify", str(model)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"fingerprint {found['fingerprint']}\n") and "accepted by the DiT\n" in told.out
    assert str(model) not in told.out and str(model) in told.err
    assert main(["verify", str(checkpoint.folder)]) == 0
    assert capsys.readouterr().out == told.out


def test_what_only_some_services_would_load(model: Path, capsys: Captured) -> None:
    tensors = {name: each for name, each in load_file(model / EMA).items() if "moe_gen" not in name}
    save_file(tensors, model / EMA)
    found = report(capsys, str(model), code=2)
    assert [role for role in ROLES if found["services"][role]["accepts"]] == ["understand"]
    assert "moe_gen" in found["services"]["full"]["problem"]
    assert report(capsys, str(model), "--role", "understand")["services"].keys() == {"understand"}


def test_what_is_wrong_is_told_in_full(model: Path, capsys: Captured) -> None:
    change(model, **{"lm_head.weight_scale": torch.ones(1)})
    (model / "vit_config.json").unlink()
    found = report(capsys, str(model), code=2)
    assert found["fingerprint"] is None and set(found["files"]) > {"config.json", EMA, "ae.safetensors"}
    assert any("vit_config.json is missing" in problem for problem in found["problems"])
    shutil.copy(GOLDEN / "checkpoint" / "vit_config.json", model)
    assert main(["verify", str(model)]) == 2
    told = capsys.readouterr()
    assert "refused by the Thinker\n" in told.out and "problem: " in told.out
    assert told.err.splitlines()[-1].startswith("bagel: error: ") and "weight_scale" in told.err


def test_a_disk_that_forgets_is_found(model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content that changed under the same size, times and inode: the cache would not see it, so all is read."""
    from bagel.checkpoint import digest_cache

    monkeypatch.setattr(digest_cache.Stamp, "settled", property(lambda stamp: True))
    before = report(capsys, str(model))
    good, of = (model / EMA).stat(), digest_cache.Stamp.of

    def as_before(path: Path) -> digest_cache.Stamp | None:
        old = digest_cache.Stamp(good.st_size, good.st_mtime_ns, good.st_ctime_ns, good.st_ino)
        return old if path.name == EMA else of(path)

    monkeypatch.setattr(digest_cache.Stamp, "of", as_before)
    with (model / EMA).open("r+b") as stream:
        stream.seek(3_000_000)
        stream.write(b"\xff\x00\xff")
    found = report(capsys, str(model), code=2)
    assert found["files"][EMA]["digest"] != before["files"][EMA]["digest"]
    assert "the same size and times" in found["problems"][0]


def test_a_name_on_the_hub_is_looked_up_in_the_cache_alone(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["verify", "nobody/nothing"]) == 2
    assert "not in the hub's cache" in capsys.readouterr().err
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--bagel"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate((GOLDEN / "checkpoint").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (blobs / "7f.incomplete").write_bytes(bytes(1234))
    assert main(["verify", "some/bagel"]) == 0
    told = capsys.readouterr()
    assert revision in told.err and "1234 bytes of downloads that broke off" in told.err
    (snapshot / EMA).unlink()
    assert main(["verify", "some/bagel"]) == 2
    assert f"{EMA} is missing" in capsys.readouterr().err
