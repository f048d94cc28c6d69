"""docs/deploy-file.md has every key of a deploy file, with its default, and no other; its example loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.schema import ConnectorConfig, DeployConfig, ParallelConfig, SamplingDefaults, StageDeploy
from bagel.deployment.settings import settings_of
from bagel.deployment.thinker_config import ThinkerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "deploy-file.md").read_text()
SECTIONS: dict[str, type[BaseModel]] = {
    "The file": DeployConfig,
    "A stage": StageDeploy,
    "`default_sampling_params`": SamplingDefaults,
    "`parallel_config`": ParallelConfig,
    "`connectors`": ConnectorConfig,
}
LEFT_TO_THE_ENGINE = {
    "engine",
    "max_model_len",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_prefix_caching",
}
"""Keys whose default neither the file nor a service's configuration has."""
SAID = {"none": None, "must be given": ..., "true": True, "false": False}


def table(heading: str) -> dict[str, str]:
    """What a section's tables give as the default of each key."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE))


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_there(heading: str) -> None:
    assert set(table(heading)) == set(SECTIONS[heading].model_fields)


def default(model: type[BaseModel], key: str) -> Any:
    """A key's default: of the file, else of the service whose setting it is."""
    field = model.model_fields[key]
    if field.is_required():
        return ...
    services = (ThinkerConfig, DitConfig) if model is StageDeploy else ()
    of_services = [each for config in services for each in settings_of(config) if each.name == key]
    value = of_services[0].default if of_services and field.default is None else field.default
    return None if value in ((), {}) or isinstance(value, BaseModel) else value


KEYS = [(heading, key) for heading in SECTIONS for key in table(heading) if key not in LEFT_TO_THE_ENGINE]


@pytest.mark.parametrize(("heading", "key"), KEYS)
def test_defaults(heading: str, key: str) -> None:
    said = table(heading)[key].strip("`")
    assert (SAID[said] if said in SAID else yaml.safe_load(said) or None) == default(SECTIONS[heading], key)


def test_the_example_loads(tmp_path: Path) -> None:
    shutil.copy(shipped_deploy_config("bagel"), tmp_path / "bagel.yaml")
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example
    (tmp_path / "mine.yaml").write_text(example[1])
    config = load_deploy_config(tmp_path / "mine.yaml")
    assert config.stage(1).devices == "1" and config.stage(0).max_num_seqs == 3
