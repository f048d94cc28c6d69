"""The frozen topologies: their values, how one is chosen, and that the functions they name are the real ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from bagel import prompts
from bagel.errors import ConfigError
from bagel.pipelines import (
    BAGEL,
    BAGEL_SINGLE_STAGE,
    BAGEL_THINK,
    PIPELINES,
    KvTransferCriteria,
    OmniKvConfig,
    PipelineConfig,
    SamplingConstraints,
    StageExecutionType,
    kv_collector,
    pipeline,
    pipeline_for_architecture,
    pipeline_for_request,
    prompt_expander,
)

OMNI = "OmniBagelForConditionalGeneration"
BAGEL_ARCH = "BagelForConditionalGeneration"
PROMPT = (prompts.TextPart("a red cube"),)


@pytest.mark.parametrize(
    ("name", "model_arch", "architectures", "roles"),
    [
        ("bagel", OMNI, (BAGEL_ARCH,), ["thinker", "dit"]),
        ("bagel_think", OMNI, (), ["thinker", "dit"]),
        ("bagel_single_stage", BAGEL_ARCH, (), ["dit"]),
    ],
)
def test_each_pipeline_has_its_stages(
    name: str, model_arch: str, architectures: tuple[str, ...], roles: list[str]
) -> None:
    spec = pipeline(name)
    assert (spec.model_type, spec.model_arch, spec.hf_architectures) == (name, model_arch, architectures)
    assert [stage.model_stage for stage in spec.stages] == roles
    assert [stage.stage_id for stage in spec.stages] == list(range(len(roles)))
    assert list(PIPELINES) == ["bagel", "bagel_think", "bagel_single_stage"]


@pytest.mark.parametrize(
    ("spec", "expand", "criteria"),
    [
        (BAGEL, "expand_cfg_prompts", KvTransferCriteria(type="prefill_finished")),
        (BAGEL_THINK, "expand_cfg_prompts_think", None),
    ],
)
def test_thinker_stage(spec: PipelineConfig, expand: str, criteria: KvTransferCriteria | None) -> None:
    stage = spec.stage("thinker")
    assert stage.execution_type is StageExecutionType.LLM_AR
    assert (stage.input_sources, stage.final_output, stage.engine_output_type) == ((), "text", "text")
    assert stage.owns_tokenizer and stage.requires_multimodal_data
    assert stage.model_arch == OMNI
    assert stage.sampling_constraints == SamplingConstraints(detokenize=True)
    assert (stage.prompt_expand_func, stage.cfg_kv_collect_func) == (expand, None)
    assert stage.omni_kv_config == OmniKvConfig(need_send_cache=True, kv_transfer_criteria=criteria)


@pytest.mark.parametrize("spec", [BAGEL, BAGEL_THINK])
def test_fed_dit_stage(spec: PipelineConfig) -> None:
    stage = spec.stage("dit")
    assert stage.execution_type is StageExecutionType.DIFFUSION
    assert (stage.input_sources, stage.final_output) == ((0,), "image")
    assert (stage.prompt_expand_func, stage.cfg_kv_collect_func) == (None, "collect_cfg_kv_caches")
    assert stage.omni_kv_config == OmniKvConfig(need_recv_cache=True)


def test_single_stage_hands_no_kv_over() -> None:
    stage = BAGEL_SINGLE_STAGE.stage("dit")
    assert stage.execution_type is StageExecutionType.DIFFUSION
    assert (stage.stage_id, stage.input_sources, stage.final_output) == (0, (), "image")
    assert (stage.prompt_expand_func, stage.cfg_kv_collect_func) == (None, None)
    assert stage.omni_kv_config == OmniKvConfig()


@pytest.mark.parametrize(
    ("spec", "text", "image"),
    [(BAGEL, ["thinker"], ["thinker", "dit"]), (BAGEL_SINGLE_STAGE, ["dit"], ["dit"])],
)
def test_a_request_goes_as_far_as_the_stage_that_gives_its_result(
    spec: PipelineConfig, text: list[str], image: list[str]
) -> None:
    assert [stage.model_stage for stage in spec.path("text")] == text
    assert [stage.model_stage for stage in spec.path("image")] == image


def test_only_prefill_finished_sends_early() -> None:
    assert BAGEL.stages[0].omni_kv_config.sends_early and not BAGEL_THINK.stages[0].omni_kv_config.sends_early
    assert not OmniKvConfig(need_send_cache=True, kv_transfer_criteria=KvTransferCriteria("other")).sends_early


def test_pipelines_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        BAGEL.stages[0].final_output = "image"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PIPELINES["mine"] = BAGEL  # type: ignore[index]


def test_an_unknown_pipeline_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'bagle'; known: bagel, bagel_think, bagel_single_stage"):
        pipeline("bagle")


def test_a_stage_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="bagel_single_stage has no stage 'thinker'; it has dit"):
        BAGEL_SINGLE_STAGE.stage("thinker")


def test_the_checkpoint_chooses_its_pipeline() -> None:
    assert pipeline_for_architecture(["Other", BAGEL_ARCH]) is BAGEL


@pytest.mark.parametrize("architectures", [["Qwen2ForCausalLM"], []])
def test_another_checkpoint_chooses_none(architectures: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"known: {BAGEL_ARCH}"):
        pipeline_for_architecture(architectures)


@pytest.mark.parametrize(
    ("deployed", "think", "served"),
    [
        (BAGEL, None, BAGEL),
        (BAGEL, False, BAGEL),
        (BAGEL, True, BAGEL_THINK),
        (BAGEL_THINK, None, BAGEL_THINK),
        (BAGEL_THINK, True, BAGEL_THINK),
        (BAGEL_THINK, False, BAGEL),
        (BAGEL_SINGLE_STAGE, None, BAGEL_SINGLE_STAGE),
        (BAGEL_SINGLE_STAGE, True, BAGEL_SINGLE_STAGE),
        (BAGEL_SINGLE_STAGE, False, BAGEL_SINGLE_STAGE),
    ],
)
def test_one_deployment_serves_both(deployed: PipelineConfig, think: bool | None, served: PipelineConfig) -> None:
    assert pipeline_for_request(deployed, think=think) is served


def test_the_named_functions_are_those_of_prompts() -> None:
    assert prompt_expander(BAGEL.stage("thinker")) is prompts.expand_cfg_prompts
    assert prompt_expander(BAGEL_THINK.stage("thinker")) is prompts.expand_cfg_prompts_think
    for spec in (BAGEL, BAGEL_THINK):
        assert kv_collector(spec.stage("dit")) is prompts.collect_cfg_kv_caches


def test_only_the_think_pipeline_decodes_and_its_companions_stop_after_prefill() -> None:
    plain = prompt_expander(BAGEL.stages[0])(PROMPT, negative_prompt="")
    thought = prompt_expander(BAGEL_THINK.stages[0])(PROMPT, negative_prompt="", max_think_tokens=7)
    assert [branch.max_tokens for branch in plain] == [1, 1, 1]
    assert [branch.max_tokens for branch in thought] == [7, 1, 1]
    assert [branch.writes for branch in (*plain, *thought)] == [False] * 3 + [True, False, False]


def test_a_stage_without_a_function_says_so() -> None:
    with pytest.raises(ConfigError, match=r"stage 0 \(dit\) has prompt_expand_func None"):
        prompt_expander(BAGEL_SINGLE_STAGE.stages[0])
    with pytest.raises(ConfigError, match=r"stage 0 \(thinker\) has cfg_kv_collect_func None"):
        kv_collector(BAGEL.stages[0])


def test_topology_and_configuration_need_no_torch() -> None:
    code = "import sys, bagel.pipelines, bagel.deployment.deploy_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
