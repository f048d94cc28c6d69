"""What a deploy file asks for must fit its pipeline, and be built: checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping

from bagel.deployment.not_built import NOT_BUILT, NotBuilt, unbuilt
from bagel.deployment.schema import DIT_KEYS, DIT_PARALLEL_KEYS, DeployConfig, ParallelConfig, StageDeploy
from bagel.deployment.shared_settings import QUANTIZATIONS
from bagel.errors import ConfigError, NotSupported
from bagel.pipelines import StageConfig, StageExecutionType


def refuse_unbuilt(config: DeployConfig) -> None:
    """Raise NotSupported for the settings whose effect is not built yet; it names the values that work.

    What vLLM has is left to the Thinker: it is refused there on torch.
    """
    writing = [spec.stage_id for spec in config.spec.stages if spec.execution_type is StageExecutionType.LLM_AR]
    owners: list[tuple[str, object, list[NotBuilt]]] = [("", config, [row for row in NOT_BUILT if row.of == "file"])]
    for stage in config.stages:
        on_vllm = stage.stage_id in writing
        rows = [row for row in NOT_BUILT if row.of == "stage" and not (row.on_vllm and on_vllm)]
        owners.append((f"{stage.where}.", stage, rows))
    problems = [
        f"{prefix}{row.key} is {value!r}, which is not built yet; {row.instead}"
        for prefix, owner, rows in owners
        for row, value in unbuilt(rows, owner)
    ]
    if problems:
        raise NotSupported(f"{config.source}: {'; '.join(problems)}")


def check(config: DeployConfig) -> None:
    """Raise ConfigError where settings do not fit the pipeline or each other."""
    found = sorted(stage.stage_id for stage in config.stages)
    if found != [spec.stage_id for spec in config.spec.stages]:
        roles = ", ".join(f"{spec.stage_id} ({spec.model_stage})" for spec in config.spec.stages)
        raise ConfigError(f"{config.source}: the stage_ids are {found}; {config.pipeline} has exactly {roles}")
    for spec in config.spec.stages:
        stage = config.stage(spec.stage_id)
        problem = (
            _role_problem(stage, spec) or _parallel_problem(stage) or _connector_problem(stage, spec, config.connectors)
        )
        if problem:
            raise ConfigError(f"{config.source}: {stage.where}.{problem}")
    seeds = {stage.default_sampling_params.seed for stage in config.stages} - {None}
    if len(seeds) > 1:
        raise ConfigError(f"{config.source}: the stages have different seeds, {seeds}; a request has one, state one")


def _role_problem(stage: StageDeploy, spec: StageConfig) -> str | None:
    """A setting of another stage's, beginning with the key; None if there is none."""
    if spec.execution_type is StageExecutionType.DIFFUSION:
        if stage.engine is not None:
            return f"engine is {stage.engine!r}; it is the Thinker's, leave it out here"
        if stage.quantization not in (None, *QUANTIZATIONS):
            return f"quantization is {stage.quantization!r}; the DiT has {', '.join(QUANTIZATIONS)}"
        text = list(stage.default_sampling_params.text()) if spec.input_sources else []
        return (
            f"default_sampling_params.{text[0]} is set; this stage writes no text, set it on stage 0" if text else None
        )
    for key in DIT_PARALLEL_KEYS:
        value = getattr(stage.parallel_config, key)
        if value != ParallelConfig.model_fields[key].default:
            return f"parallel_config.{key} is {value}; it is for the DiT stage only, leave it out here"
    for key in DIT_KEYS:
        if value := getattr(stage, key):
            return f"{key} is {value}; it is for the DiT stage only, leave it out here"
    return None


def _parallel_problem(stage: StageDeploy) -> str | None:
    """Sizes that contradict each other, beginning with the key; None if they do not."""
    if stage.parallel_config.use_hsdp and stage.cpu_offload is not None:
        return f"cpu_offload is {stage.cpu_offload}; use_hsdp divides the weights over GPUs instead, leave out one"
    try:
        world = stage.world_size
    except ConfigError as error:
        section = "" if str(error).startswith("tensor_parallel_size") else "parallel_config."
        return f"{section}{error}"
    if len(stage.device_ids) != world:
        example = ",".join(str(gpu) for gpu in range(world))
        return f'devices is {stage.devices!r}; it must list a GPU for each rank of world size {world}, like "{example}"'
    return None


def _connector_problem(stage: StageDeploy, spec: StageConfig, connectors: Mapping[str, object]) -> str | None:
    """Inputs that do not exist, beginning with the key; None if all do."""
    inputs = [f"from_stage_{source}" for source in spec.input_sources]
    for key, name in stage.input_connectors.items():
        if key not in inputs:
            return f"input_connectors.{key} is no input of this stage; it has {', '.join(inputs) or 'none, remove it'}"
        if name not in connectors:
            known = ", ".join(connectors) or "none"
            return f"input_connectors.{key} is {name!r}; it must be a name under connectors (there: {known})"
    return None
