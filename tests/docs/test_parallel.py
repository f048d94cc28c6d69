"""The deploy files of docs/parallel.md load, and spread a stage over as many GPUs as they list."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config

PAGE = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_load(number: int, tmp_path: Path) -> None:
    shutil.copy(shipped_deploy_config("bagel"), tmp_path / "bagel.yaml")
    (tmp_path / "mine.yaml").write_text(EXAMPLES[number])
    config = load_deploy_config(tmp_path / "mine.yaml")
    assert any(stage.world_size == len(stage.device_ids) > 1 for stage in config.stages)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
