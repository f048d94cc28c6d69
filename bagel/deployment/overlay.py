"""A deploy file over the one that it inherits, and settings given as keywords over both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bagel.deployment.checks import check, refuse_unbuilt
from bagel.deployment.schema import DIT_KEYS, DIT_PARALLEL_KEYS, DeployConfig, StageDeploy
from bagel.deployment.schema_errors import suggest, validate
from bagel.deployment.yaml_files import merge, read_yaml
from bagel.errors import ConfigError
from bagel.pipelines import StageExecutionType

SPREADING = frozenset({"tensor_parallel_size", *DIT_PARALLEL_KEYS})
"""Settings that say how many ranks a stage has."""


def with_overrides(config: DeployConfig, **overrides: object) -> DeployConfig:
    """A copy with stage settings given as keywords, as the embedded API and the command line take them.

    A setting goes to each stage that it means something to (vae_*, cfg_* and hsdp settings to the DiT, engine to the
    Thinker, quantization and tensor_parallel_size to the DiT and to a Thinker whose engine is vllm); None means not
    given. A stage that gets more ranks this way, and no devices, takes the GPUs that follow its own; stages that
    have GPUs of their own keep apart. Raises ConfigError
    or NotSupported like `load_deploy_config`.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    source = f"{config.source} with {words}" if given else config.source
    changed = validate(_overlay(config, given, source), source)
    if "devices" not in given and SPREADING & given.keys():
        changed = validate(_with_devices(changed), source)
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

    for stage in data.get("stages", ()):
        spread = stage.setdefault("parallel_config", {})
        for key, value in given.items():
            others: tuple[str, ...] = (*DIT_PARALLEL_KEYS, *DIT_KEYS)
            if stage["stage_id"] in drawing:
                others = ("engine",)
            elif given.get("engine", stage.get("engine")) != "vllm":
                # The torch engine has neither, and the DiT beside it may be quantised, and have several GPUs.
                others = (*others, "quantization")
                if given.get("tensor_parallel_size") != 1:  # one GPU is what every engine has
                    others = (*others, "tensor_parallel_size")
            if key == "tensor_parallel_size" and key not in others:
                spread.pop(key, None)  # stated in one place only
            if key not in others:
                (spread if key in DIT_PARALLEL_KEYS else stage)[key] = value
    return data


def _with_devices(config: DeployConfig) -> dict[str, Any]:
    """The deploy file's data, where a stage with fewer devices than ranks takes the GPUs that follow its last one.

    Stages that share GPUs go on to share them; those that do not move on where an earlier one has taken theirs.
    """
    data, taken = config.model_dump(exclude_unset=True), list[tuple[set[int], set[int]]]()
    for stage, keys in zip(config.stages, data.get("stages", ()), strict=True):
        with suppress(ConfigError):  # sizes that do not fit, which `check` tells of
            gpus, ranks = stage.device_ids, stage.world_size
            kept = {gpu for before, now in taken if before.isdisjoint(gpus) for gpu in now}
            free = (gpu for gpu in itertools.count(max(gpus) + 1) if gpu not in kept)
            now = [gpu if gpu not in kept else next(free) for gpu in gpus]
            now += itertools.islice(free, max(0, ranks - len(now)))
            taken.append((set(gpus), set(now)))
            if now != list(gpus):
                keys["devices"] = ",".join(map(str, now))
    return data
