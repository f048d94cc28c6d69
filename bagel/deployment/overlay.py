"""A deploy file over the one that it inherits, and settings given as keywords over both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bagel.deployment.checks import check, refuse_unbuilt
from bagel.deployment.schema import DIT_KEYS, DIT_PARALLEL_KEYS, DeployConfig, StageDeploy
from bagel.deployment.schema_errors import suggest, validate
from bagel.deployment.yaml_files import merge, read_yaml
from bagel.errors import ConfigError
from bagel.pipelines import StageExecutionType


def with_overrides(config: DeployConfig, **overrides: object) -> DeployConfig:
    """A copy with stage settings given as keywords, as the embedded API and the command line take them.

    A setting goes to each stage that it means something to (vae_*, cfg_* and hsdp settings to the DiT, engine to the
    Thinker, quantization to the DiT and to a Thinker whose engine is vllm); None means not given. Raises ConfigError or
    NotSupported like `load_deploy_config`.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    source = f"{config.source} with {words}" if given else config.source
    changed = validate(_overlay(config, given, source), source)
    # Refused first: nobody should have to mend a setting only to hear that it does not exist yet.
    refuse_unbuilt(changed)
    check(changed)
    return changed


def inherit(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's data over that of its base_config; ConfigError for anything wrong in either, or for a circle."""
    here = path.resolve()
    if here in heirs:
        circle = " -> ".join(file.name for file in (*heirs, here))
        raise ConfigError(f"{heirs[-1]}: base_config goes in a circle, {circle}; remove one")
    data = read_yaml(path, f"correct base_config in {heirs[-1]}" if heirs else "give the path of a deploy file")
    validate(data, str(path))  # each file by itself, so that a message names the file that holds the key
    base = data.pop("base_config", None)
    if base is None:
        return data
    inherited = inherit(path.parent / base, (*heirs, here))
    stages = {stage["stage_id"]: stage for stage in inherited.get("stages", ())}
    for stage in data.get("stages", ()):
        stages[stage["stage_id"]] = merge(stages.get(stage["stage_id"], {}), stage)
    return {**merge(inherited, data), "stages": list(stages.values())}


def _overlay(config: DeployConfig, given: Mapping[str, object], source: str) -> dict[str, Any]:
    """The deploy file's data with the overrides written into its stages."""
    nested = {"stage_id", "parallel_config", "default_sampling_params", "input_connectors"}
    known = {*StageDeploy.model_fields, *DIT_PARALLEL_KEYS} - nested
    for key in given:
        if key not in known:
            raise ConfigError(f"{source}: {key} is not a known setting; {suggest(key, known)}")
    data = config.model_dump(exclude_unset=True)
    drawing = [spec.stage_id for spec in config.spec.stages if spec.execution_type is StageExecutionType.DIFFUSION]
    if "engine" in given and len(drawing) == len(config.spec.stages):
        raise ConfigError(f"{source}: engine is the Thinker's, and {config.pipeline} has none; leave it out")

    def engine(stage: Mapping[str, Any]) -> object:
        return given.get("engine", stage.get("engine"))

    for stage in data.get("stages", ()):
        spread = stage.setdefault("parallel_config", {})
        for key, value in given.items():
            if key == "tensor_parallel_size":
                spread.pop(key, None)  # stated in one place only
            others = ("engine",) if stage["stage_id"] in drawing else (*DIT_PARALLEL_KEYS, *DIT_KEYS)
            # The torch engine has none, and a DiT is quantised beside it.
            plain = key == "quantization" and stage["stage_id"] not in drawing and engine(stage) != "vllm"
            if key not in others and not plain:
                (spread if key in DIT_PARALLEL_KEYS else stage)[key] = value
    return data
