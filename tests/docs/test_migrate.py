"""docs/migrate.md says of every flag and key of vllm-omni's what becomes of it here: its tables against the code."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel.cli.flags import add_generate_flags
from bagel.deployment.deploy_file import load_deploy_config
from bagel.deployment.overlay import with_overrides
from bagel.deployment.schema import DeployConfig
from bagel.errors import ConfigError, NotSupported
from bagel.request import REFERENCE_EDIT, ImageSettings
from bagel_gateway.rest.dialect import GUIDANCE

PAGE = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()
TOP = ("pipeline", "async_chunk", "connectors", "platforms")


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table, its head left out."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


FLAGS = [(flag, here) for cell, here in rows("Flags of `end2end.py`") for flag in re.findall("`(--[a-z-]+)`", cell)]
KEYS = [(key.strip("`"), example.strip("`"), here) for key, example, *here in rows("Deploy YAML")]


def deploy(folder: Path, stage: int, key: str, value: Any) -> DeployConfig:
    """A file of two stages with one key more."""
    stages: list[dict[str, Any]] = [{"stage_id": 0}, {"stage_id": 1}]
    data: dict[str, Any] = {"pipeline": "bagel", "stages": stages}
    if key in TOP:
        data[key] = value
    else:
        stages[stage][key] = value
    if key == "tensor_parallel_size":
        stages[stage]["devices"] = "0,1"
    file = folder / "deploy.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_deploy_config(file)


@pytest.mark.parametrize(("flag", "here"), FLAGS)
def test_flags(flag: str, here: str) -> None:
    parser = argparse.ArgumentParser()
    add_generate_flags(parser)
    known = flag in parser.format_help()
    assert known == (not here.startswith("gone")), here


@pytest.mark.parametrize(("key", "example", "here"), KEYS)
@pytest.mark.parametrize("stage", [0, 1])
def test_keys(tmp_path: Path, stage: int, key: str, example: str, here: list[str]) -> None:
    says = here[stage]
    if says.startswith("refused"):
        with pytest.raises((ConfigError, NotSupported), match=key):
            deploy(tmp_path, stage, key, yaml.safe_load(example))
        return
    config = deploy(tmp_path, stage, key, yaml.safe_load(example))
    noted = {
        engine: any(key in note for note in with_overrides(config, engine=engine).notes())
        for engine in ("torch", "vllm")
    }
    assert noted["torch"] == (says.startswith("noted") or says.endswith("else noted"))
    assert noted["vllm"] == says.startswith("noted")


def test_every_flag_of_the_page_is_read() -> None:
    assert len(FLAGS) > 25 and len(KEYS) > 18


def guidance(page: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The rows of the table of guidance by default, by kind of picture and whose they are."""
    found, kind = {}, ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"\d\.\d", cells[2]):
            kind = cells[0] or kind
            found[kind, cells[1]] = tuple(cells[2:])
    return found


def test_both_pages_print_the_guidance_that_there_is() -> None:
    options = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    table = guidance(PAGE)
    assert table == guidance(options) and len(table) == 8
    for kind, own in (("text-to-image", {}), ("edits", REFERENCE_EDIT)):
        for whose, more in (("here", own), ("vllm-omni, and `--compat vllm-omni`", GUIDANCE)):
            settings = ImageSettings(**{**own, **more})
            interval = " ".join(map(str, settings.cfg_interval))
            scales = (str(settings.cfg_text_scale), str(settings.cfg_img_scale))
            assert table[kind, whose] == (*scales, interval, settings.cfg_renorm_type)
