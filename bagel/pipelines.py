"""The three frozen pipelines: which stages a deployment has, and how K/V passes between them. No torch, no I/O.

The values are those of vllm-omni. Code reads a stage's fields and never asks for a pipeline's name. The fields say
which stage expands a prompt into its guidance branches, when K/V may leave, which stage collects it, and what each
stage returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeVar

from bagel.errors import ConfigError
from bagel.prompts import (
    Branch,
    BranchName,
    collect_cfg_kv_caches,
    expand_cfg_prompts,
    expand_cfg_prompts_think,
)

F = TypeVar("F")

PromptExpander = Callable[..., tuple[Branch, ...]]
"""(prompt, *, negative_prompt) -> the branches; expand_cfg_prompts_think takes max_think_tokens too."""
KvCollector = Callable[[tuple[Branch, ...], Mapping[BranchName, Any], frozenset[BranchName]], dict[BranchName, Any]]
"""(branches, contexts by branch, branches needed) -> the needed contexts; IncompleteContext if one is missing."""


class StageExecutionType(StrEnum):
    """How a stage computes."""

    LLM_AR = "llm_ar"
    DIFFUSION = "diffusion"


PREFILL_FINISHED = "prefill_finished"


@dataclass(frozen=True)
class KvTransferCriteria:
    """When K/V may leave before the sequence ends. prefill_finished: each page as soon as prefill has it."""

    type: str


@dataclass(frozen=True)
class OmniKvConfig:
    """A stage's part in the transfer of K/V. A sender without criteria sends after the end of the sequence."""

    need_send_cache: bool = False
    need_recv_cache: bool = False
    kv_transfer_criteria: KvTransferCriteria | None = None

    @property
    def sends_early(self) -> bool:
        """Whether pages leave while the prompt is being computed, so that the receiver takes part from the start."""
        criteria = self.kv_transfer_criteria
        return criteria is not None and criteria.type == PREFILL_FINISHED


@dataclass(frozen=True)
class SamplingConstraints:
    """Sampling settings that the topology fixes. detokenize: the stage returns text, never ids alone."""

    detokenize: bool


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: a service, or (single stage) the whole model.

    input_sources: the stage_ids that feed it; final_output: its output for the user, "text" or "image".
    `prompt_expander` and `kv_collector` look up the functions by their names here; None: the stage has none.

    Five fields decide nothing and are here only for comparison with vllm-omni: owns_tokenizer,
    requires_multimodal_data, model_arch, engine_output_type, sampling_constraints. vllm-omni leaves them unset for its
    single stage, which tokenizes, reads images and detokenizes all the same.
    """

    stage_id: int
    model_stage: str
    execution_type: StageExecutionType
    input_sources: tuple[int, ...]
    final_output: str
    owns_tokenizer: bool = False
    requires_multimodal_data: bool = False
    model_arch: str | None = None
    engine_output_type: str | None = None
    sampling_constraints: SamplingConstraints | None = None
    prompt_expand_func: str | None = None
    cfg_kv_collect_func: str | None = None
    omni_kv_config: OmniKvConfig = OmniKvConfig()


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A frozen topology; hf_architectures: the checkpoint architectures that select it by default."""

    model_type: str
    model_arch: str
    hf_architectures: tuple[str, ...]
    stages: tuple[StageConfig, ...]

    @property
    def thinks(self) -> bool | None:
        """Whether a think text comes before the picture; None where one topology serves both (single stage)."""
        expand = self.stages[0].prompt_expand_func
        return None if expand is None else expand == expand_cfg_prompts_think.__name__

    def path(self, output: str) -> tuple[StageConfig, ...]:
        """The stages that a request for "text" or an "image" passes: up to the one with that final output, or all."""
        # None names it: a text from the single stage, which names only pictures but has the whole model.
        for number, stage in enumerate(self.stages, 1):
            if stage.final_output == output:
                return self.stages[:number]
        return self.stages

    def stage(self, model_stage: str) -> StageConfig:
        """The stage with that role, "thinker" or "dit"; ConfigError if this pipeline has none."""
        for stage in self.stages:
            if stage.model_stage == model_stage:
                return stage
        roles = ", ".join(stage.model_stage for stage in self.stages)
        raise ConfigError(f"the pipeline {self.model_type} has no stage {model_stage!r}; it has {roles}")


def _two_stages(model_type: str, architectures: tuple[str, ...], expand: str, send: OmniKvConfig) -> PipelineConfig:
    """A pipeline of Thinker and DiT. The two pipelines of this kind differ only in these arguments."""
    model_arch = "OmniBagelForConditionalGeneration"
    thinker = StageConfig(
        stage_id=0,
        model_stage="thinker",
        execution_type=StageExecutionType.LLM_AR,
        input_sources=(),
        final_output="text",
        owns_tokenizer=True,
        requires_multimodal_data=True,
        model_arch=model_arch,
        engine_output_type="text",
        sampling_constraints=SamplingConstraints(detokenize=True),
        prompt_expand_func=expand,
        omni_kv_config=send,
    )
    dit = StageConfig(
        stage_id=1,
        model_stage="dit",
        execution_type=StageExecutionType.DIFFUSION,
        input_sources=(0,),
        final_output="image",
        cfg_kv_collect_func="collect_cfg_kv_caches",
        omni_kv_config=OmniKvConfig(need_recv_cache=True),
    )
    return PipelineConfig(
        model_type=model_type, model_arch=model_arch, hf_architectures=architectures, stages=(thinker, dit)
    )


BAGEL = _two_stages(
    "bagel",
    ("BagelForConditionalGeneration",),
    "expand_cfg_prompts",
    OmniKvConfig(need_send_cache=True, kv_transfer_criteria=KvTransferCriteria(PREFILL_FINISHED)),
)
BAGEL_THINK = _two_stages("bagel_think", (), "expand_cfg_prompts_think", OmniKvConfig(need_send_cache=True))
BAGEL_SINGLE_STAGE = PipelineConfig(
    model_type="bagel_single_stage",
    model_arch="BagelForConditionalGeneration",
    hf_architectures=(),
    stages=(
        StageConfig(
            stage_id=0,
            model_stage="dit",
            execution_type=StageExecutionType.DIFFUSION,
            input_sources=(),
            final_output="image",
        ),
    ),
)

PIPELINES: Mapping[str, PipelineConfig] = MappingProxyType(
    {spec.model_type: spec for spec in (BAGEL, BAGEL_THINK, BAGEL_SINGLE_STAGE)}
)
_EXPANDERS: Mapping[str, PromptExpander] = MappingProxyType(
    {f.__name__: f for f in (expand_cfg_prompts, expand_cfg_prompts_think)}
)
_COLLECTORS: Mapping[str, KvCollector] = MappingProxyType({"collect_cfg_kv_caches": collect_cfg_kv_caches})


def pipeline(name: str) -> PipelineConfig:
    """The frozen pipeline with that name; otherwise ConfigError, which lists the known ones."""
    if name not in PIPELINES:
        raise ConfigError(f"unknown pipeline {name!r}; known: {', '.join(PIPELINES)}")
    return PIPELINES[name]


def pipeline_for_architecture(architectures: Iterable[str]) -> PipelineConfig:
    """The pipeline that a checkpoint's `architectures` (in its config.json) select; ConfigError if none does."""
    seen = tuple(architectures)
    for spec in PIPELINES.values():
        if not set(seen).isdisjoint(spec.hf_architectures):
            return spec
    known = ", ".join(name for spec in PIPELINES.values() for name in spec.hf_architectures)
    raise ConfigError(
        f"no pipeline for a checkpoint of architectures {', '.join(seen) or '(none)'}; known: {known}. "
        "Give a BAGEL checkpoint, or name the pipeline in a deploy file"
    )


def pipeline_for_request(deployed: PipelineConfig, *, think: bool | None) -> PipelineConfig:
    """The frozen pipeline that serves one request of a deployment; think None means as deployed."""
    if think is None or deployed.thinks in (None, think):
        return deployed
    return next(spec for spec in PIPELINES.values() if spec.model_arch == deployed.model_arch and spec.thinks is think)


def prompt_expander(stage: StageConfig) -> PromptExpander:
    """The function of bagel.prompts that the stage names as prompt_expand_func; ConfigError if it names none."""
    return _named(_EXPANDERS, stage, "prompt_expand_func")


def kv_collector(stage: StageConfig) -> KvCollector:
    """The function of bagel.prompts that the stage names as cfg_kv_collect_func; ConfigError if it names none."""
    return _named(_COLLECTORS, stage, "cfg_kv_collect_func")


def _named(functions: Mapping[str, F], stage: StageConfig, field: str) -> F:
    name = getattr(stage, field)
    if name not in functions:
        raise ConfigError(
            f"stage {stage.stage_id} ({stage.model_stage}) has {field} {name!r}; known: {', '.join(functions)}"
        )
    return functions[name]
