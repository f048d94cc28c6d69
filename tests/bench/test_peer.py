"""`python -m bench peer`: our side on a CPU, and the peer's script against a stand-in for vllm-omni."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.model.weights import empty_model, known_names, load_model
from bench import __main__ as bench
from bench import peer
from bench.models import TINY
from bench.random_checkpoint import _settings, make

STAND_IN = """
from types import SimpleNamespace
class Omni:
    def __init__(self, model, deploy_config, log_stats):
        open(deploy_config).close()
        print("INFO 11-30 09:59:36 [selector.py:87] Resolved diffusion attention backend 'SDPA' for role='self'")
        self.default_sampling_params_list = [SimpleNamespace()]
    def generate(self, prompts, sampling_params_list):
        (prompt,), (params,) = prompts, sampling_params_list
        edit = "multi_modal_data" in prompt
        assert edit == (params.extra_args["cfg_img_scale"] == 1.5) == prompt["prompt"].startswith("<|fim_middle|>")
        assert params.extra_args["cfg_interval"] == [0.4, 1.0] and params.height == params.width == 64
        assert params.num_inference_steps == 3
        assert not edit or prompt["multi_modal_data"]["image"].size == (64, 64)
        return [SimpleNamespace(images=["a picture"])]
    def close(self):
        pass
"""


def test_a_random_checkpoint_is_one_of_bagel(tmp_path: Path) -> None:
    make(tmp_path, TINY, torch.device("cpu"))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config == TINY
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == known_names(TINY)
    model = load_model(checkpoint, Role.FULL, delimiter_ids=(0, 1))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_full_size_is_the_public_models(tmp_path: Path) -> None:
    for name, settings in _settings(BAGEL_7B_MOT).items():
        (tmp_path / name).write_text(json.dumps(settings))
    whole = json.loads((tmp_path / "config.json").read_text())
    assert whole["vit_config"]["num_hidden_layers"] == 27 and whole["llm_config"]["vocab_size"] == 152064
    assert empty_model(BAGEL_7B_MOT, Role.FULL, dtype=torch.bfloat16, device="meta").config == BAGEL_7B_MOT


@pytest.mark.slow
def test_both_sides_on_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "vllm_omni"
    (package / "entrypoints").mkdir(parents=True)
    (package / "deploy").mkdir()
    (package / "__init__.py").write_text("__version__ = '9.9'")
    (package / "entrypoints" / "__init__.py").write_text("")
    (package / "entrypoints" / "omni.py").write_text(STAND_IN)
    (package / "deploy" / "bagel_single_stage.yaml").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    command = ["peer", "--tiny", "--device", "cpu", "--peer-python", sys.executable]
    assert bench.main([*command, "--json", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()][1:]
    assert [row["case"] for row in rows] == [case.name for case in peer.SMALL]
    assert all(row["ours_s"] > 0 and row["ratio"] == row["vllm_omni_s"] / row["ours_s"] for row in rows)
    told = capsys.readouterr().out
    assert "vllm-omni 9.9" in told and "attention SDPA" in told


def test_a_peer_that_is_not_there_is_told(tmp_path: Path) -> None:
    seconds, why = peer._theirs(tmp_path, Path(sys.executable), peer.SMALL)
    assert not seconds and "cannot import it (ModuleNotFoundError: No module named 'vllm_omni')" in why
    seconds, why = peer._theirs(tmp_path, None, peer.SMALL)
    assert not seconds and "--peer-python" in why


def test_flags_of_another_part_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["pull", "--peer-python", "python"]) == 2
    assert "--peer-python belongs to python -m bench peer" in capsys.readouterr().err
    assert bench.main(["peer", "--device", "cpu"]) == 2
    assert "add --tiny" in capsys.readouterr().err
