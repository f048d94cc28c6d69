"""The keys of a deploy file: which pipeline, on which GPUs, with which settings. Read strictly.

The settings of a service that a stage may have come from the service's own configuration. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, create_model, field_validator, model_validator

from bagel.deployment.dit_config import DitConfig
from bagel.deployment.settings import Config, settings_of
from bagel.deployment.thinker_config import TORCH_LACKS, VLLM_ONLY, ThinkerConfig
from bagel.errors import ConfigError, InvalidRequest
from bagel.parallel.config import ParallelConfig as Sizes
from bagel.pipelines import PipelineConfig, pipeline
from bagel.request import MAX_SEED, TextSettings

VLLM_KEYS = tuple(each.name for each in VLLM_ONLY if each.name not in TORCH_LACKS)
"""Stage keys that only tune the vLLM engine."""
_THINKER = {each.name for each in settings_of(ThinkerConfig) if each.stage}
DIT_KEYS = tuple(each.name for each in settings_of(DitConfig) if each.stage and each.name not in _THINKER)
"""Stage keys that mean something to the DiT stage only."""
REAL_CONNECTOR = "GrpcConnector"
FOREIGN_CONNECTOR = re.compile(r"(SharedMemory|Mooncake|Nixl|Mori|Yuanrong|CudaI[Pp][Cc]|Pris[Kk][Vv])\w*Connector")
"""vllm-omni's connectors: accepted and noted, since K/V moves over gRPC here."""
FOREIGN_KEYS: Mapping[str, str] = {
    "hf_overrides": "positions are built in",
    "limit_mm_per_prompt": "the gateway's --max-images says how many images a request may have",
    "enable_chunked_prefill": "prefill reads a prompt part by part in any case",
    "output_connectors": "a stage's input_connectors say where its K/V come from",
}
"""Stage keys of vllm-omni's own deploy files that are accepted and noted, each with the reason."""

Count = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    """No unknown keys, no conversions (neither "2" nor true is an int), no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ParallelConfig(_Model):
    """How one stage is spread over GPUs. Sizes are numbers of ranks."""

    tensor_parallel_size: Count | None = None
    cfg_parallel_size: Annotated[int, Field(ge=1, le=3)] = 1
    context_parallel_size: Count = 1
    vae_patch_parallel_size: Count = 1
    use_hsdp: bool = False
    hsdp_shard_size: Count = 1
    hsdp_replicate_size: Count = 1
    pipeline_parallel_size: Count = 1
    data_parallel_size: Count = 1
    sequence_parallel_size: Count = 1
    ulysses_degree: Count = 1
    ring_degree: Count = 1
    allgather_degree: Count = 1
    enable_expert_parallel: bool = False

    @field_validator("hsdp_shard_size", mode="before")
    @classmethod
    def _shard_size(cls, value: object) -> object:
        return 1 if value == -1 else value  # how vllm-omni's files leave it open


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


def _keys_of_services() -> Any:
    """A model with the keys of a stage that are settings of its service. None: not set, the service's default holds."""
    keys: dict[str, Any] = {}
    for each in (each for config in (ThinkerConfig, DitConfig) for each in settings_of(config) if each.stage):
        kind = Literal[tuple(each.choices)] if each.choices else each.kind
        bounds: Any = Field(ge=each.at_least, gt=each.above, le=each.at_most)
        switch = each.kind is bool and not each.optional
        # A setting of both services has the wider type, the Thinker's; `check` knows what the DiT takes.
        if each.name in keys:
            continue
        keys[each.name] = (bool, False) if switch else (Annotated[kind, bounds] | None, None)
    return create_model("_ServiceKeys", __base__=_Model, **keys)


class StageDeploy(_keys_of_services()):  # type: ignore[misc]  # keys that no type checker sees
    """One stage of the deploy file: where it runs, and the settings of its service that are marked as a stage's."""

    stage_id: int = Field(ge=0)
    devices: str = "0"
    trust_remote_code: bool = False
    parallel_config: ParallelConfig = ParallelConfig()
    default_sampling_params: SamplingDefaults = SamplingDefaults()
    input_connectors: dict[str, str] = Field(default={})
    output_connectors: dict[str, str] | None = None
    hf_overrides: dict[str, Any] | None = None
    limit_mm_per_prompt: dict[str, Any] | None = None
    enable_chunked_prefill: bool | None = None

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
        return int(self.tensor_parallel_size or self.parallel_config.tensor_parallel_size or 1)

    @property
    def parallel(self) -> Sizes:
        """How the stage is spread over ranks; ConfigError for sizes that do not fit together."""
        keys = {each.name: getattr(self.parallel_config, each.name) for each in fields(Sizes)}
        return Sizes(**{**keys, "tensor_parallel_size": self.tp_size})

    @property
    def world_size(self) -> int:
        """The stage's ranks, one GPU each."""
        return self.parallel.world_size

    @property
    def tiling(self) -> bool:
        """The effective vae_use_tiling: VAE patch parallelism hands out tiles, so it turns tiling on."""
        return self.vae_use_tiling or self.parallel.vae_use_tiling

    def settings(self, config: type[Config]) -> dict[str, Any]:
        """What the stage sets of its service's configuration, by the names of the fields."""
        effective = {"tensor_parallel_size": self.tp_size, "vae_use_tiling": self.tiling}
        values = {
            each.name: effective.get(each.name, getattr(self, each.name)) for each in settings_of(config) if each.stage
        }
        spread = self.parallel_config
        values |= {each.name: getattr(spread, each.name) for each in settings_of(config) if each.section}
        return {name: value for name, value in values.items() if value is not None}


class DeployConfig(_Model):
    """A whole deploy file. Made by `load_deploy_config`, which checks it against its pipeline."""

    base_config: str | None = None
    pipeline: str = "bagel"
    async_chunk: bool = False
    stages: Annotated[tuple[StageDeploy, ...], Field(strict=False)] = ()
    connectors: dict[str, ConnectorConfig] = {}
    platforms: dict[str, Any] | None = None
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
            notes += [
                f"{stage.where}: {key} has no effect, {why}"
                for key, why in FOREIGN_KEYS.items()
                if getattr(stage, key) is not None
            ]
        notes += self._not_quantised()
        if self.platforms is not None:
            notes.append("platforms has no effect: the stages' own settings are used on every platform")
        return notes

    def _not_quantised(self) -> list[str]:
        """A Thinker in full beside a quantised DiT: who gave --quantization may think that both are."""
        stages = {spec.model_stage: self.stage(spec.stage_id) for spec in self.spec.stages}
        thinker, dits = stages.get("thinker"), stages["dit"].quantization
        if thinker is None or dits is None or thinker.quantization is not None:
            return []
        return [
            f"{thinker.where}: the Thinker is not quantised, {dits} is the DiT's alone; one whose engine is vllm, "
            "and not auto, can be quantised too"
        ]
