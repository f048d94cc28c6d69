"""The parity command: green on the recordings, red on anything that is off or was left out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel.parity.__main__ import main
from tests.parity.copies import copied

GOLDEN = Path(__file__).parents[1] / "golden"
WRITTEN, DRAWN = "text2text", "t2i_64x64_nocfg"
WHOLE_SET = os.environ.get("BAGEL_GOLDEN")


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, object]], list[str]]:
    code = main([str(folder), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {line["case"]: line for line in lines[:-1]}, lines[-1]["failed"]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A writable folder with two cases."""
    for name in ("checkpoint", "tables", "inputs"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / "fp32").mkdir()
    for case in (WRITTEN, DRAWN):
        for path in (GOLDEN / "fp32").glob(f"{case}.*"):
            shutil.copy(path, tmp_path / "fp32")
    rows = "\n".join(f"| `{case}` | | | |" for case in (WRITTEN, DRAWN))
    (tmp_path / "README.md").write_text(f"## 3. Cases\n\n{rows}\n\n## 4. Else\n| `other` |\n")
    return tmp_path


def test_every_recorded_case_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    code, cases, failed = run(GOLDEN, capsys)
    assert (code, failed) == (0, [])
    assert {"interleave", "think_edit", "components", "tables/resize", "bf16/t2i_64x64_nocfg"} <= cases.keys()
    assert cases["interleave"]["max_abs_error"]["v_guided"] < 1e-4  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.skipif(WHOLE_SET is None, reason="BAGEL_GOLDEN does not name the whole set")
def test_the_whole_set_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert WHOLE_SET is not None
    code, cases, failed = run(Path(WHOLE_SET), capsys)
    assert (code, failed) == (0, [])
    assert "edit_full" in cases


def test_a_quantised_model_is_reported_beside_bfloat16(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(few), "--quantization", "fp8", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == sorted([WRITTEN, DRAWN])
    for line in lines:
        bfloat16, fp8 = line["distance"]["bfloat16"], line["distance"]["fp8"]
        assert bfloat16["tensors"] > 10 and 0 < bfloat16["median"] < fp8["median"] < 0.2
    drawn = next(line["distance"] for line in lines if line["case"] == DRAWN)
    assert 0 < drawn["bfloat16"]["pictures"]["image"] < drawn["fp8"]["pictures"]["image"]


def test_one_changed_weight_is_found(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(few / "checkpoint" / "ema.safetensors")
    weights["language_model.model.layers.1.self_attn.k_norm_moe_gen.weight"] *= 1.02
    save_file(weights, few / "checkpoint" / "ema.safetensors")
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["t2i_64x64_nocfg"])
    assert cases["text2text"]["ok"]


def test_each_fault_of_a_recording_is_a_failure_and_the_rest_goes_on(
    few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every fault is in a copy of its own of a case that is right; what is listed in vain comes last."""
    for key in ("call_order", "result", "tensors", "images", "settings", "inputs"):
        with changed(few, DRAWN, f"lacks_{key}") as data:
            del data[key]
    for field in ("n_past", "first_position"):
        with changed(few, DRAWN, f"other_{field}") as data:
            next(call for call in data["call_order"] if call["call"].endswith("forward_inference"))[field] += 1
    with changed(few, WRITTEN, "other_id") as data:
        data["result"]["ids_with_bos"][3] += 1
    more = copied(few / "fp32", WRITTEN, "more_tensors").with_suffix(".safetensors")
    save_file({**load_file(more), "new.family": torch.zeros(1)}, more)
    fewer = copied(few / "fp32", WRITTEN, "fewer_tensors").with_suffix(".safetensors")
    save_file({"gen.ids": load_file(fewer)["gen.ids"]}, fewer)
    copied(few / "fp32", DRAWN, "no_tensors").with_suffix(".safetensors").write_bytes(b"no")
    (few / "tables" / "colours.json").write_text("[]")
    (few / "tables" / "timesteps.json").write_text("[]")
    (few / "tables" / "resize.json").unlink()
    (few / "README.md").write_text(f"## 3. Cases\n\n| `{WRITTEN}` | | | |\n| `gone` | |\n\n## 4. Else\n| `other` |\n")
    (few / "manifest.json").write_text(json.dumps({"files": {"inputs/gone.png": {}}}))

    code, cases, failed = run(few, capsys)
    spoilt = {name for name in cases if name.startswith(("lacks_", "other_", "more_", "fewer_", "no_"))}
    listed = [f"{name} (listed but not there)" for name in ("fp32/gone.json", "inputs/gone.png", "tables/resize.json")]
    assert code == 1 and len(spoilt) == 12
    assert set(failed) == {"tables/colours", "tables/timesteps", *spoilt, *listed} and failed[-3:] == listed
    assert cases[DRAWN]["ok"] and cases[WRITTEN]["ok"]
    for field in ("n_past", "first_position"):
        assert "call_order.forwards" in str(cases[f"other_{field}"]["failures"])
    assert cases["more_tensors"]["failures"] == ["not compared: new.family"]
    assert "gen.logits: not recorded" in str(cases["fewer_tensors"]["failures"])


@contextmanager
def changed(folder: Path, case: str, name: str) -> Iterator[Any]:
    """The JSON of a copy of a case, for a change."""
    path = copied(folder / "fp32", case, name)
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))


def test_lines_fit_a_terminal(few: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with changed(few, WRITTEN, "other_id") as data:
        data["result"]["ids_with_bos"][3] += 1
    assert main([str(few)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line.split()[3] for line in lines if not line.startswith("tables/")}
    assert told == {WRITTEN: "ok", DRAWN: "ok", "other_id": "WRONG"}
    assert max(map(len, lines)) <= 80
    assert last.startswith("wrong: other_id; --json says where (")


def test_a_folder_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(few), "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: device cuda is not there: torch sees no GPU; use --device cpu\n"


def test_a_bfloat16_set_with_holes_has_as_many_failures(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "bf16", few / "bf16")
    comparison = few / "bf16" / "comparison.json"
    data = json.loads(comparison.read_text())
    for name in ("no_case", "no_twin", "no_distance"):
        copied(few / "bf16", DRAWN, name)
        copied(few / "fp32", DRAWN, name)
        data["cases"][name] = dict(data["cases"][DRAWN])
    (few / "bf16" / "no_case.safetensors").unlink()
    (few / "fp32" / "no_twin.safetensors").unlink()
    data["cases"]["no_distance"].pop("v_guided")
    comparison.write_text(json.dumps(data))
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, ["no_twin", "bf16/no_case", "bf16/no_distance", "bf16/no_twin"])
    assert cases[f"bf16/{DRAWN}"]["ok"]


def test_a_bfloat16_set_without_distances_is_a_failure(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "bf16", few / "bf16")
    (few / "bf16" / "comparison.json").unlink()
    code, cases, failed = run(few, capsys)
    assert (code, failed) == (1, [f"bf16/{DRAWN}"])
    assert cases[WRITTEN]["ok"]
