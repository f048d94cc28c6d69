"""The parity command through real services: green on the recordings, red on anything that is off or was left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bagel.parity.__main__ import main
from bagel.pipelines import PIPELINES
from tests.conftest import GOLDEN

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]


def run(folder: Path, topology: str, capsys: Captured) -> tuple[int, dict[str, dict[str, object]], list[str]]:
    code = main([str(folder), "--topology", topology])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {line["case"]: line for line in lines[:-1]}, lines[-1]["failed"]


@pytest.mark.parametrize("topology", PIPELINES)
def test_every_end_to_end_case_is_reproduced(topology: str, capsys: Captured) -> None:
    code, cases, failed = run(GOLDEN, topology, capsys)
    assert (code, failed) == (0, [])
    compared = cases["think_edit"]
    assert {"ids", "text"} <= set(compared["equal"])  # type: ignore[call-overload]
    pulled = {"kv_gen", "kv_cfg_img"} <= set(compared["max_abs_error"])  # type: ignore[call-overload]
    assert pulled == (topology != "bagel_single_stage")


def test_what_is_off_or_gone_is_a_failure(tmp_path: Path, capsys: Captured) -> None:
    for name in ("checkpoint", "tables", "inputs"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / "fp32").mkdir()
    for case in ("text2text", "text_prefill", "t2i_64x64_nocfg"):
        for path in (GOLDEN / "fp32").glob(f"{case}.*"):
            shutil.copy(path, tmp_path / "fp32")
    (tmp_path / "README.md").write_text("## 3. Cases\n\n| `text2text` | |\n| `edit_small` | |\n")
    recorded = load_file(tmp_path / "fp32" / "text_prefill.safetensors")
    recorded["turn1.kv.2.k"][3, 0, 5] += 0.01
    save_file(recorded, tmp_path / "fp32" / "text_prefill.safetensors")
    (tmp_path / "fp32" / "t2i_64x64_nocfg.image.png").unlink()
    code, cases, failed = run(tmp_path, "bagel", capsys)
    assert (code, failed) == (1, ["t2i_64x64_nocfg", "text_prefill", "fp32/edit_small.json (listed but not there)"])
    assert "turn1.kv.2.k: off by 0.01" in str(cases["text_prefill"]["failures"])
