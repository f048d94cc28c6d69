"""The parity command: green on the recordings, red on anything that is off or was left out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel.parity.__main__ import main

GOLDEN = Path(__file__).parents[1] / "golden"
WHOLE_SET = os.environ.get("BAGEL_GOLDEN")


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, object]], list[str]]:
    code = main([str(folder)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {line["case"]: line for line in lines[:-1]}, lines[-1]["failed"]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A writable folder with two cases."""
    for name in ("checkpoint", "tables", "inputs"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / "fp32").mkdir()
    for case in ("text2text", "t2i_64x64_nocfg"):
        for path in (GOLDEN / "fp32").glob(f"{case}.*"):
            shutil.copy(path, tmp_path / "fp32")
    rows = "\n".join(f"| `{case}` | | | |" for case in ("text2text", "t2i_64x64_nocfg"))
    (tmp_path / "README.md").write_text(f"## 3. Cases\n\n{rows}\n\n## 4. Else\n| `other` |\n")
    return tmp_path


def test_every_recorded_case_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    code, cases, failed = run(GOLDEN, capsys)
    assert (code, failed) == (0, [])
    assert {"interleave", "think_edit", "components", "tables/resize", "bf16/t2i_64x64_nocfg"} <= cases.keys()
    assert cases["interleave"]["max_abs_error"]["v_guided"] < 1e-4  # type: ignore[index]


@pytest.mark.skipif(WHOLE_SET is None, reason="BAGEL_GOLDEN does not name the whole set")
def test_the_whole_set_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert WHOLE_SET is not None
    code, cases, failed = run(Path(WHOLE_SET), capsys)
    assert (code, failed) == (0, [])
    assert "edit_full" in cases


def test_one_changed_weight_is_found(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(few / "checkpoint" / "ema.safetensors")
    weights["language_model.model.layers.1.self_attn.k_norm_moe_gen.weight"] *= 1.02
    save_file(weights, few / "checkpoint" / "ema.safetensors")
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["t2i_64x64_nocfg"])
    assert cases["text2text"]["ok"]


def test_a_recorded_tensor_that_nothing_compares_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = few / "fp32" / "text2text.safetensors"
    save_file({**load_file(path), "new.family": torch.zeros(1)}, path)
    code, cases, _ = run(few, capsys)
    assert code == 1
    assert cases["text2text"]["failures"] == ["not compared: new.family"]


def test_a_listed_case_that_is_not_there_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (few / "fp32").glob("text2text.*"):
        path.unlink()
    code, _, failed = run(few, capsys)
    assert (code, failed) == (1, ["fp32/text2text.json (listed but not there)"])


def test_an_unknown_table_and_a_changed_id_are_failures(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (few / "tables" / "colours.json").write_text("[]")
    path = few / "fp32" / "text2text.json"
    data = json.loads(path.read_text())
    data["result"]["ids_with_bos"][3] += 1
    path.write_text(json.dumps(data))
    code, _, failed = run(few, capsys)
    assert (code, failed) == (1, ["tables/colours", "text2text"])


def test_a_folder_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_listed_tensors_that_are_gone_are_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = few / "fp32" / "text2text.safetensors"
    save_file({"gen.ids": load_file(path)["gen.ids"]}, path)
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["text2text"])
    assert "gen.logits: not recorded" in str(cases["text2text"]["failures"])


def test_a_file_of_the_manifest_that_is_gone_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (few / "manifest.json").write_text(json.dumps({"files": {"tables/gone.json": {}}}))
    code, _, failed = run(few, capsys)
    assert (code, failed) == (1, ["tables/gone.json (listed but not there)"])


def test_a_table_that_is_gone_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (few / "tables" / "resize.json").unlink()
    code, _, failed = run(few, capsys)
    assert (code, failed) == (1, ["tables/resize.json (listed but not there)"])


@pytest.mark.parametrize("key", ["call_order", "result", "tensors", "images", "settings", "inputs"])
def test_a_case_without_one_of_its_parts_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    path = few / "fp32" / "t2i_64x64_nocfg.json"
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data))
    code, _cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["t2i_64x64_nocfg"])


@pytest.mark.parametrize("field", ["n_past", "first_position"])
def test_a_length_or_position_of_a_call_that_differs_is_a_failure(
    few: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    path = few / "fp32" / "t2i_64x64_nocfg.json"
    data = json.loads(path.read_text())
    next(call for call in data["call_order"] if call["call"].endswith("forward_inference"))[field] += 1
    path.write_text(json.dumps(data))
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["t2i_64x64_nocfg"])
    assert "call_order.forwards" in str(cases["t2i_64x64_nocfg"]["failures"])


@pytest.mark.parametrize("damage", ["case", "comparison", "twin", "distance"])
def test_a_bfloat16_set_with_a_hole_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    shutil.copytree(GOLDEN / "bf16", few / "bf16")
    comparison = few / "bf16" / "comparison.json"
    data = json.loads(comparison.read_text())
    if damage == "case":
        (few / "bf16" / "t2i_64x64_nocfg.safetensors").unlink()
    elif damage == "comparison":
        comparison.unlink()
    elif damage == "twin":
        (few / "fp32" / "t2i_64x64_nocfg.safetensors").unlink()
    else:
        data["cases"]["t2i_64x64_nocfg"].pop("v_guided")
        comparison.write_text(json.dumps(data))
    code, cases, failed = run(few, capsys)
    assert code == 1
    assert "bf16/t2i_64x64_nocfg" in failed
    assert cases["text2text"]["ok"]


def test_an_empty_table_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (few / "tables" / "timesteps.json").write_text("[]")
    code, _, failed = run(few, capsys)
    assert (code, failed) == (1, ["tables/timesteps"])


def test_a_damaged_file_is_one_failure_and_the_rest_goes_on(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (few / "fp32" / "t2i_64x64_nocfg.safetensors").write_bytes(b"no")
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["t2i_64x64_nocfg"])
    assert cases["text2text"]["ok"]
