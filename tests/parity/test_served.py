"""The parity command through real services: green on the recordings, red on anything that is off or was left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bagel.parity.__main__ import main
from bagel.pipelines import PIPELINES
from tests.conftest import GOLDEN
from tests.parity.copies import copied

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]


def run(folder: Path, topology: str, capsys: Captured) -> tuple[int, dict[str, dict[str, object]], list[str]]:
    code = main([str(folder), "--topology", topology, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {line["case"]: line for line in lines[:-1]}, lines[-1]["failed"]


@pytest.mark.parametrize("topology", [name for name in PIPELINES if name != "bagel"])
def test_every_end_to_end_case_is_reproduced(topology: str, capsys: Captured) -> None:
    code, cases, failed = run(GOLDEN, topology, capsys)
    assert (code, failed) == (0, [])
    assert compares_think_edit(cases, pulls=topology != "bagel_single_stage")


def compares_think_edit(cases: dict[str, dict[str, object]], *, pulls: bool) -> bool:
    compared: Any = cases["think_edit"]
    pulled = {"kv_gen", "kv_cfg_img"} <= set(compared["max_abs_error"])
    return {"ids", "text"} <= set(compared["equal"]) and pulled == pulls


def test_two_stages_reproduce_all_but_what_is_off_or_gone(tmp_path: Path, capsys: Captured) -> None:
    golden = Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    copied(golden / "fp32", "text_prefill", "spoilt_kv")
    copied(golden / "fp32", "t2i_64x64_nocfg", "spoilt_picture")
    recorded = load_file(golden / "fp32" / "spoilt_kv.safetensors")
    recorded["turn1.kv.2.k"][3, 0, 5] += 0.01
    save_file(recorded, golden / "fp32" / "spoilt_kv.safetensors")
    (golden / "fp32" / "spoilt_picture.image.png").unlink()
    listed = golden / "README.md"
    listed.write_text(listed.read_text().replace("| `components` |", "| `edit_gone` | |\n| `components` |"))
    code, cases, failed = run(golden, "bagel", capsys)
    assert (code, failed) == (1, ["spoilt_kv", "spoilt_picture", "fp32/edit_gone.json (listed but not there)"])
    assert "turn1.kv.2.k: off by 0.01" in str(cases["spoilt_kv"]["failures"])
    assert compares_think_edit(cases, pulls=True)
