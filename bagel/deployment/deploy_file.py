"""The deploy file: which pipeline, on which GPUs, with which settings. Read strictly, checked before anything starts.

An unknown key, a value of the wrong type or a setting without effect is an error that names the file, the key, the
value and what would be right. Settings that exist but are not built yet are refused by `refuse_unbuilt` alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from bagel.deployment.not_built import NOT_BUILT, NotBuilt, unbuilt
from bagel.deployment.settings import Config, settings_of
from bagel.deployment.thinker_config import VLLM_ONLY
from bagel.deployment.yaml_files import merge, read_yaml
from bagel.errors import MOST_TOLD, ConfigError, InvalidRequest, NotSupported
from bagel.pipelines import PipelineConfig, StageConfig, StageExecutionType, pipeline
from bagel.ranges import in_words
from bagel.request import MAX_SEED, TextSettings
from bagel.vocabulary import DEPLOY_INSTEAD, instead_of

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of `bagel`, in an installed wheel or a checkout."""
VLLM_KEYS = tuple(each.name for each in VLLM_ONLY if each.name not in {row.key for row in NOT_BUILT})
"""Stage keys that only the vLLM engine honours."""
REAL_CONNECTOR = "GrpcConnector"
FOREIGN_CONNECTOR = re.compile(r"(SharedMemory|Mooncake|Nixl|Mori|Yuanrong|CudaI[Pp][Cc]|Pris[Kk][Vv])\w*Connector")
"""vllm-omni's connectors: accepted and noted, since K/V moves over gRPC here."""


Count = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    """No unknown keys, no conversions (neither "2" nor true is an int), no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ParallelConfig(_Model):
    """How one stage is spread over GPUs. Sizes are numbers of ranks."""

    tensor_parallel_size: Count | None = None
    cfg_parallel_size: Annotated[int, Field(ge=1, le=3)] = 1
    vae_patch_parallel_size: Count = 1
    use_hsdp: bool = False
    hsdp_shard_size: Count = 1
    hsdp_replicate_size: Count = 1


DIT_PARALLEL_KEYS = tuple(key for key in ParallelConfig.model_fields if key != "tensor_parallel_size")
"""parallel_config keys that mean something to the DiT stage only."""


class SamplingDefaults(_Model):
    """Settings for requests that do not give their own; None: the defaults of bagel.request hold."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    repetition_penalty: float | None = None
    detokenize: bool | None = None

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        # The request's own ranges, so that a default never fails each request that relies on it.
        try:
            TextSettings(**self.text())
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        if self.detokenize is False:
            raise ValueError("detokenize is False; it must be true, text is always given back as text")
        return self

    def text(self) -> dict[str, Any]:
        """The settings given for decoding text, by their names in bagel.request.TextSettings."""
        return self.model_dump(exclude={"seed", "detokenize"}, exclude_none=True)


class ConnectorConfig(_Model):
    """A way for K/V from stage to stage. `extra` belongs to vllm-omni's connectors; GrpcConnector has no settings."""

    name: str
    extra: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name != REAL_CONNECTOR and not FOREIGN_CONNECTOR.fullmatch(self.name):
            raise ValueError(f"name is {self.name!r}; it must be {REAL_CONNECTOR}")
        if self.name == REAL_CONNECTOR and self.extra:
            raise ValueError(f"extra is {self.extra}; it must be {{}}, {REAL_CONNECTOR} has no settings")
        return self


class StageDeploy(_Model):
    """One stage of the deploy file. None: not set, the engine's own default holds."""

    stage_id: int = Field(ge=0)
    devices: str = "0"
    tensor_parallel_size: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_num_seqs: Count | None = None
    max_model_len: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    enforce_eager: bool | None = None
    trust_remote_code: bool = False
    enable_prefix_caching: bool | None = None
    vae_use_tiling: bool = False
    quantization: str | None = None
    engine: Literal["auto", "torch", "vllm"] | None = None
    parallel_config: ParallelConfig = ParallelConfig()
    default_sampling_params: SamplingDefaults = SamplingDefaults()
    input_connectors: dict[str, str] = {}

    @field_validator("devices")
    @classmethod
    def _device_list(cls, value: str) -> str:
        gpus = re.findall(r"\d+", value)
        if not re.fullmatch(r"\d+( *, *\d+)*", value, re.ASCII) or len(set(map(int, gpus))) < len(gpus):
            raise ValueError(f'{value!r} is no list of different GPU numbers; write it like "0" or "0,1"')
        return value

    @model_validator(mode="after")
    def _one_tensor_parallel_size(self) -> Self:
        here, there = self.tensor_parallel_size, self.parallel_config.tensor_parallel_size
        if here is not None and there is not None and here != there:
            raise ValueError(
                f"tensor_parallel_size is {here}, parallel_config.tensor_parallel_size is {there}; state only one"
            )
        return self

    @property
    def where(self) -> str:
        """The stage's place in the file, for messages."""
        return f"stages[stage_id={self.stage_id}]"

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The GPU numbers, in rank order."""
        return tuple(int(gpu) for gpu in self.devices.split(","))

    @property
    def tp_size(self) -> int:
        """The effective tensor_parallel_size."""
        return self.tensor_parallel_size or self.parallel_config.tensor_parallel_size or 1

    @property
    def world_size(self) -> int:
        """The stage's ranks, one GPU each."""
        spread = self.parallel_config
        hsdp = spread.hsdp_shard_size * spread.hsdp_replicate_size if spread.use_hsdp else 1
        return self.tp_size * spread.cfg_parallel_size * hsdp

    @property
    def tiling(self) -> bool:
        """The effective vae_use_tiling: VAE patch parallelism hands out tiles, so it turns tiling on."""
        return self.vae_use_tiling or self.parallel_config.vae_patch_parallel_size > 1

    def settings(self, config: type[Config]) -> dict[str, Any]:
        """What the stage sets of its service's configuration, by the names of the fields."""
        effective = {"tensor_parallel_size": self.tp_size, "vae_use_tiling": self.tiling}
        values = {
            each.name: effective.get(each.name, getattr(self, each.name)) for each in settings_of(config) if each.stage
        }
        return {name: value for name, value in values.items() if value is not None}


class DeployConfig(_Model):
    """A whole deploy file. Made by `load_deploy_config`, which checks it against its pipeline."""

    base_config: str | None = None
    pipeline: str = "bagel"
    async_chunk: bool = False
    stages: Annotated[tuple[StageDeploy, ...], Field(strict=False)] = ()
    connectors: dict[str, ConnectorConfig] = {}
    _source: str = PrivateAttr("deploy settings")

    @field_validator("pipeline")
    @classmethod
    def _known_pipeline(cls, value: str) -> str:
        try:
            return pipeline(value).model_type
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("stages")
    @classmethod
    def _each_once(cls, value: tuple[StageDeploy, ...]) -> tuple[StageDeploy, ...]:
        ids = [stage.stage_id for stage in value]
        if len(set(ids)) < len(ids):
            raise ValueError(f"the stage_ids are {ids}; each must be there once")
        return value

    @property
    def source(self) -> str:
        """Where this came from, for messages: the file, and the overrides if any."""
        return self._source

    @property
    def spec(self) -> PipelineConfig:
        """The frozen pipeline that is deployed."""
        return pipeline(self.pipeline)

    def stage(self, stage_id: int) -> StageDeploy:
        """The settings of that stage; ConfigError if there is none."""
        for stage in self.stages:
            if stage.stage_id == stage_id:
                return stage
        raise ConfigError(f"{self.source}: there is no stage_id {stage_id} in stages; add one or inherit base_config")

    def with_overrides(self, **overrides: object) -> DeployConfig:
        """A copy with stage settings given as keywords, as the embedded API and the command line take them.

        A setting goes to each stage that it means something to (vae_*, cfg_* and hsdp settings to the DiT, engine to
        the Thinker); None means not given. Raises ConfigError or NotSupported like `load_deploy_config`.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        words = ", ".join(f"{key}={value!r}" for key, value in given.items())
        source = f"{self.source} with {words}" if given else self.source
        config = _validate(_overlay(self, given, source), source)
        # Refused first: nobody should have to mend a setting only to hear that it does not exist yet.
        refuse_unbuilt(config)
        check(config)
        return config

    def sampling_defaults(self) -> dict[str, Any]:
        """The default_sampling_params of all stages together: the deploy file's defaults for a request."""
        params = [stage.default_sampling_params.model_dump(exclude_none=True) for stage in self.stages]
        return {key: value for stage in params for key, value in stage.items()}

    def notes(self) -> list[str]:
        """One line for each thing in the file that is accepted but has no meaning here, to be logged at start."""
        notes = [
            f"connectors.{name}: {connector.name} is not used, K/V moves over gRPC ({REAL_CONNECTOR})"
            for name, connector in self.connectors.items()
            if connector.name != REAL_CONNECTOR
        ]
        for stage in self.stages:
            unused = [key for key in VLLM_KEYS if getattr(stage, key) is not None and stage.engine != "vllm"]
            if unused:
                notes.append(f"{stage.where}: no meaning for the torch engine, only for vLLM: {', '.join(unused)}")
            if stage.trust_remote_code:
                notes.append(f"{stage.where}: trust_remote_code has no effect, no remote code is ever run")
        return notes


def load_deploy_config(path: str | Path, **overrides: object) -> DeployConfig:
    """Read a deploy file with what it inherits, apply overrides (see DeployConfig.with_overrides) and check it.

    Raises ConfigError for anything wrong, NotSupported for a setting whose effect is not built yet.
    """
    return _validate(_inherit(Path(path), ()), str(path)).with_overrides(**overrides)


def parse_deploy_config(data: Mapping[str, Any], source: str = "deploy settings") -> DeployConfig:
    """Settings from a mapping, checked but not refused as unbuilt; base_config is not followed."""
    config = _validate(data, source)
    check(config)
    return config


def shipped_deploy_config(name: str) -> Path:
    """The deploy file that ships for a pipeline; ConfigError if the name is unknown or the file is not there."""
    filename = f"{pipeline(name).model_type}.yaml"
    for folder in (PACKAGE / "deploy", PACKAGE.parent / "deploy"):  # an installed wheel, a checkout
        if (folder / filename).is_file():
            return folder / filename
    raise ConfigError(f"the shipped {filename} is not in {PACKAGE / 'deploy'}; install again or give --deploy-config")


def effective_settings(stage: StageDeploy) -> str:
    """The line a stage logs at start: what its parallel and VAE settings come to."""
    return (
        f"stage {stage.stage_id}: tensor_parallel_size {stage.tp_size}, vae_patch_parallel_size "
        f"{stage.parallel_config.vae_patch_parallel_size}, vae_use_tiling {str(stage.tiling).lower()}"
    )


def refuse_unbuilt(config: DeployConfig) -> None:
    """Raise NotSupported for the settings whose effect is not built yet; it names the values that work.

    What vLLM has is left to the Thinker: it is refused there on torch.
    """
    thinkers = [spec.stage_id for spec in config.spec.stages if spec.model_stage == "thinker"]
    owners: list[tuple[str, object, list[NotBuilt]]] = [("", config, [row for row in NOT_BUILT if row.of == "file"])]
    for stage in config.stages:
        on_vllm = stage.stage_id in thinkers
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
        text = list(stage.default_sampling_params.text()) if spec.input_sources else []
        return (
            f"default_sampling_params.{text[0]} is set; this stage writes no text, set it on stage 0" if text else None
        )
    for key in DIT_PARALLEL_KEYS:
        value = getattr(stage.parallel_config, key)
        if value != ParallelConfig.model_fields[key].default:
            return f"parallel_config.{key} is {value}; it is for the DiT stage only, leave it out here"
    return "vae_use_tiling is True; it is for the DiT stage only, leave it out here" if stage.vae_use_tiling else None


def _parallel_problem(stage: StageDeploy) -> str | None:
    """Sizes that contradict each other, beginning with the key; None if they do not."""
    spread, world = stage.parallel_config, stage.world_size
    if spread.use_hsdp and spread.hsdp_shard_size < 2:
        return "parallel_config.hsdp_shard_size is 1; use_hsdp shards over that many GPUs, it must be at least 2"
    if not spread.use_hsdp and (spread.hsdp_shard_size > 1 or spread.hsdp_replicate_size > 1):
        return "parallel_config.use_hsdp is False; it must be true for hsdp_shard_size or hsdp_replicate_size above 1"
    if spread.vae_patch_parallel_size > world:
        return (
            f"parallel_config.vae_patch_parallel_size is {spread.vae_patch_parallel_size}; it must be at most the "
            f"stage's world size {world} (tensor_parallel_size x cfg_parallel_size x hsdp sizes)"
        )
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


def _overlay(config: DeployConfig, given: Mapping[str, object], source: str) -> dict[str, Any]:
    """The deploy file's data with the overrides written into its stages."""
    nested = {"stage_id", "parallel_config", "default_sampling_params", "input_connectors"}
    known = {*StageDeploy.model_fields, *DIT_PARALLEL_KEYS} - nested
    for key in given:
        if key not in known:
            raise ConfigError(f"{source}: {key} is not a known setting; {_suggest(key, known)}")
    data, dit = config.model_dump(exclude_unset=True), config.spec.stage("dit").stage_id
    if "engine" in given and len(config.spec.stages) == 1:
        raise ConfigError(f"{source}: engine is the Thinker's, and {config.pipeline} has none; leave it out")
    for stage in data.get("stages", ()):
        spread = stage.setdefault("parallel_config", {})
        for key, value in given.items():
            if key == "tensor_parallel_size":
                spread.pop(key, None)  # stated in one place only
            others = ("engine",) if stage["stage_id"] == dit else (*DIT_PARALLEL_KEYS, "vae_use_tiling")
            if key not in others:
                (spread if key in DIT_PARALLEL_KEYS else stage)[key] = value
    return data


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "the top of the file": DeployConfig,
    "stages": StageDeploy,
    "parallel_config": ParallelConfig,
    "default_sampling_params": SamplingDefaults,
    "connectors": ConnectorConfig,
}
_WANTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "literal_error": "one of {expected}",
    "string_type": 'a text, in quotes if it looks like a number (like "0")',
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "invalid_key": "a word, as every key",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
"""Pydantic's kinds of errors, as what a value must be."""


def _validate(data: Mapping[str, Any], source: str) -> DeployConfig:
    """Keys, types and ranges; ConfigError with all problems in one line."""
    try:
        config = DeployConfig.model_validate(data)
    except ValidationError as error:
        # Unknown keys first: a key that is missing is often one that is misspelt.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        told = [_describe(problem, data) for problem in problems[:MOST_TOLD]]
        more = [f"and {len(problems) - MOST_TOLD} more"] * (len(problems) > MOST_TOLD)
        raise ConfigError(f"{source}: {'; '.join([*told, *more])}") from None
    config._source = source
    return config


def _describe(problem: ErrorDetails, data: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words: the key's path, the value seen, what would be right."""
    kind, loc, value, context = problem["type"], problem["loc"], problem["input"], problem.get("ctx", {})
    path = ".".join(str(key) for key in loc)
    if loc[:1] == ("stages",) and len(loc) > 1:
        stage = data["stages"][loc[1]]
        name = stage.get("stage_id", "?") if isinstance(stage, dict) else "?"
        path = ".".join([f"stages[stage_id={name}]", *map(str, loc[2:])])
    if kind == "extra_forbidden":
        section = next((str(key) for key in reversed(loc[:-1]) if key in _SECTIONS), "the top of the file")
        hint = _suggest(str(loc[-1]), _SECTIONS[section].model_fields)
        return f"{path} is not a known key (value {value!r:.80}); {hint}"
    if kind == "missing":
        return f"{path} is missing; add it"
    if kind == "value_error":
        return f"{path}: {context['error']}"
    wanted = _WANTED[kind].format(**context) if kind in _WANTED else f"right ({problem['msg']})"
    if kind in ("greater_than", "greater_than_equal", "less_than_equal"):
        wanted = _range(loc) or wanted
    return f"{path} is {value!r:.80}; it must be {wanted}"


def _range(loc: tuple[int | str, ...]) -> str | None:
    """The whole range of a number, whichever end was passed; None where it has one end."""
    key = str(loc[-1])
    models = [model for model in _SECTIONS.values() if key in model.model_fields]
    field = str(models[0].__annotations__.get(key, "")) if models else ""
    ends = dict(re.findall(r"(ge|gt|le)=([\w.]+)", field))
    if len(ends) < 2:
        return None
    numbers = {end: MAX_SEED if value == "MAX_SEED" else float(value) for end, value in ends.items()}
    return in_words(above=numbers.get("gt"), at_least=numbers.get("ge"), at_most=numbers.get("le"))


def _suggest(key: str, known: Collection[str]) -> str:
    """What an unknown key may have been meant to be."""
    for section, model in _SECTIONS.items():
        if key in model.model_fields:
            return f"it belongs in {section}"
    return instead_of(key, DEPLOY_INSTEAD, known) or f"known: {', '.join(sorted(known))}"


def _inherit(path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """The file's data over that of its base_config; ConfigError for anything wrong in either, or for a circle."""
    here = path.resolve()
    if here in heirs:
        circle = " -> ".join(file.name for file in (*heirs, here))
        raise ConfigError(f"{heirs[-1]}: base_config goes in a circle, {circle}; remove one")
    data = read_yaml(path, f"correct base_config in {heirs[-1]}" if heirs else "give the path of a deploy file")
    _validate(data, str(path))  # each file by itself, so that a message names the file that holds the key
    base = data.pop("base_config", None)
    if base is None:
        return data
    inherited = _inherit(path.parent / base, (*heirs, here))
    stages = {stage["stage_id"]: stage for stage in inherited.get("stages", ())}
    for stage in data.get("stages", ()):
        stages[stage["stage_id"]] = merge(stages.get(stage["stage_id"], {}), stage)
    return {**merge(inherited, data), "stages": list(stages.values())}
