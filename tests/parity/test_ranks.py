"""The parity command on several ranks: green on the recordings, red on what only one of the ranks can see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bagel.parity.__main__ import main
from tests.conftest import GOLDEN
from tests.parity.copies import copied

pytestmark = pytest.mark.slow


def test_each_rank_compares_its_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint", "tables", "inputs"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / "fp32").mkdir()
    for case in ("t2i_64x64_nocfg", "text2text"):
        for path in (GOLDEN / "fp32").glob(f"{case}.*"):
            shutil.copy(path, tmp_path / "fp32")
    (tmp_path / "README.md").write_text("## 3. Cases\n")
    copied(tmp_path / "fp32", "t2i_64x64_nocfg", "spoilt")
    spoilt = tmp_path / "fp32" / "spoilt.safetensors"
    recorded = load_file(spoilt)
    recorded["kv_gen.1.k"][2, 1] += 0.01  # of the head that the second rank has
    save_file(recorded, spoilt)
    assert main([str(tmp_path), "--json", "--tensor-parallel-size", "2"]) == 1
    *lines, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert summary["failed"] == ["spoilt"] and {"spoilt", "text2text"} <= {line["case"] for line in lines}
    cases = {line["case"]: line for line in lines}
    assert cases["spoilt"]["failures"] == ["kv_gen.1.k: off by 0.01, allowed 0.0001"]
    assert {"x", "v_guided", "decoded", "kv_gen"} <= cases["t2i_64x64_nocfg"]["max_abs_error"].keys()


def test_sizes_that_do_not_divide_the_model_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), "--tensor-parallel-size", "4"]) == 2
    assert "do not divide among 4 tensor-parallel ranks; choose a size of 1, 2" in capsys.readouterr().err
