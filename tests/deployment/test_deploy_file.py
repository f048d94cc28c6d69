"""Deploy files: what is read, what is refused, and that each message names file, key, value and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from bagel.deployment import checks, deploy_file
from bagel.deployment.checks import check, refuse_unbuilt
from bagel.deployment.deploy_file import (
    effective_settings,
    load_deploy_config,
    shipped_deploy_config,
)
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.overlay import with_overrides
from bagel.deployment.schema import DeployConfig
from bagel.deployment.schema_errors import validate
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.errors import ConfigError, NotSupported
from bagel.prompts import TextPart
from bagel.request import Modality, resolve


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(dedent(text), encoding="utf-8")
    return path


def two_stages(thinker: dict[str, Any] | None = None, dit: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {"stages": [{"stage_id": 0, **(thinker or {})}, {"stage_id": 1, **(dit or {})}], **top}


def parse_deploy_config(data: dict[str, Any], source: str = "deploy settings") -> DeployConfig:
    """Settings from a mapping, checked but not refused as unbuilt."""
    config = validate(data, source)
    check(config)
    return config


def problem_of(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_deploy_config(data, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml: ") and "\n" not in message
    return message.removeprefix("mine.yaml: ")


# What ships


@pytest.mark.parametrize(
    ("name", "stage_ids"), [("bagel", [0, 1]), ("bagel_think", [0, 1]), ("bagel_single_stage", [0])]
)
def test_shipped_files_load_and_decide_nothing_for_the_user(name: str, stage_ids: list[int]) -> None:
    deploy = load_deploy_config(shipped_deploy_config(name))
    assert deploy.pipeline == deploy.spec.model_type == name
    assert [stage.stage_id for stage in deploy.stages] == stage_ids
    assert {stage.devices for stage in deploy.stages} == {"0"}
    assert deploy.sampling_defaults() == {}  # no seed, temperature or penalty
    assert deploy.notes() == []


def test_shipped_file_of_an_installed_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "bagel"
    (package / "deploy").mkdir(parents=True)
    monkeypatch.setattr(deploy_file, "PACKAGE", package)
    with pytest.raises(ConfigError, match=r"bagel\.yaml is not in .*; install again or give --deploy-config"):
        shipped_deploy_config("bagel")
    shipped = write(package / "deploy", "", "bagel.yaml")
    assert shipped_deploy_config("bagel") == shipped


def test_shipped_file_of_an_unknown_pipeline() -> None:
    with pytest.raises(ConfigError, match=r"unknown pipeline '\.\./secrets'; known: bagel"):
        shipped_deploy_config("../secrets")


# Reading


def test_defaults_of_a_bare_file(tmp_path: Path) -> None:
    deploy = load_deploy_config(write(tmp_path, "stages: [{stage_id: 1}, {stage_id: 0}]"))
    assert (deploy.pipeline, deploy.async_chunk) == ("bagel", False)
    assert deploy.stage(0).device_ids == deploy.stage(1).device_ids == (0,)
    assert deploy.stage(1).world_size == 1
    with pytest.raises(ConfigError, match="no stage_id 2"):
        deploy.stage(2)


def test_every_key_of_a_stage_is_read() -> None:
    stage: dict[str, Any] = {
        "stage_id": 0,
        "devices": "0, 2",
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": 32768,
        "max_num_seqs": 3,
        "max_model_len": 4096,
        "gpu_memory_utilization": 1,
        "enforce_eager": True,
        "attention_backend": "fa3",
        "trust_remote_code": False,
        "enable_prefix_caching": True,
        "vae_use_tiling": True,
        "quantization": "fp8",
        "parallel_config": {
            "tensor_parallel_size": 2,
            "cfg_parallel_size": 1,
            "vae_patch_parallel_size": 2,
            "use_hsdp": False,
            "hsdp_shard_size": 1,
            "hsdp_replicate_size": 1,
        },
        "default_sampling_params": {
            "temperature": 0.4,
            "top_p": 0.9,
            "top_k": 1,
            "max_tokens": 2048,
            "seed": 52,
            "repetition_penalty": 1.05,
            "detokenize": True,
        },
    }
    deploy = parse_deploy_config({"pipeline": "bagel_single_stage", "stages": [stage], "async_chunk": False})
    read = deploy.stage(0).model_dump(exclude_unset=True)
    assert read == {**stage, "gpu_memory_utilization": 1.0}
    assert deploy.stage(0).device_ids == (0, 2)


def test_sampling_defaults_reach_a_request() -> None:
    thinker = {"default_sampling_params": {"top_k": 1, "max_tokens": 9, "seed": None, "detokenize": True}}
    deploy = parse_deploy_config(two_stages(thinker, {"default_sampling_params": {"seed": 52}}))
    given = {"top_k": 4, "do_sample": True}
    request = resolve(Modality.TEXT2TEXT, (TextPart("hello"),), given, deploy.sampling_defaults())
    assert (request.seed, request.text.max_tokens, request.text.top_k) == (52, 9, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds None; it must hold keys and values"),
        ("[1]", r"holds \[1\]; it must hold"),
        ("pipeline: [", "is no valid YAML in line 1"),
        ("pipeline: bagel\npipeline: bagel_think", "line 1: the key pipeline is there twice"),
        ("stages: [{stage_id: 0, max_num_seqs: 1, max_num_seqs: 2}]", "the key max_num_seqs is there twice"),
        ("async_chunk: 2024-13-45", "is no valid YAML: month must be"),
    ],
)
def test_a_file_that_holds_no_settings(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_deploy_config(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file.*; give the path"):
        load_deploy_config(tmp_path / "none.yaml")


# Strictness


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"max_num_seqs": "2"}, "stages[stage_id=1].max_num_seqs is '2'; it must be a whole number"),
        ({"max_num_seqs": True}, "stages[stage_id=1].max_num_seqs is True; it must be a whole number"),
        ({"max_num_seqs": 2.0}, "stages[stage_id=1].max_num_seqs is 2.0; it must be a whole number"),
        ({"max_num_seqs": 0}, "stages[stage_id=1].max_num_seqs is 0; it must be at least 1"),
        ({"enforce_eager": 1}, "stages[stage_id=1].enforce_eager is 1; it must be true or false"),
        ({"gpu_memory_utilization": "0.4"}, "gpu_memory_utilization is '0.4'; it must be a number"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; it must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0; it must be above 0"),
        ({"devices": 0}, "stages[stage_id=1].devices is 0; it must be a text, in quotes"),
        ({"devices": "0;1"}, '\'0;1\' is no list of different GPU numbers; write it like "0" or "0,1"'),
        ({"devices": "0,00"}, "'0,00' is no list of different GPU numbers"),
        ({"devices": ""}, "'' is no list of different GPU numbers"),
        ({"parallel_config": 2}, "stages[stage_id=1].parallel_config is 2; it must be a mapping"),
        (
            {"parallel_config": {"cfg_parallel_size": 4}},
            "parallel_config.cfg_parallel_size is 4; it must be from 1 to 3",
        ),
        ({"default_sampling_params": {"seed": -1}}, "default_sampling_params.seed is -1; it must be from 0 to"),
        ({"default_sampling_params": {"temperature": "hot"}}, "temperature is 'hot'; it must be a number"),
        ({"default_sampling_params": {"temperature": -0.1}}, "temperature is -0.1; it must be a number from 0 to 100"),
        ({"default_sampling_params": {"detokenize": False}}, "detokenize is False; it must be true"),
    ],
)
def test_a_wrong_value_is_named(stage: dict[str, Any], message: str) -> None:
    assert message in problem_of(two_stages(dit=stage))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (two_stages(dit={"max_num_seq": 2}), "max_num_seq is not a known key (value 2); did you mean max_num_seqs?"),
        (two_stages(stagse=[]), "stagse is not a known key (value []); did you mean stages?"),
        (two_stages(dit={"cfg_parallel_size": 2}), "size is not a known key (value 2); it belongs in parallel_config"),
        (two_stages(dit={"seed": 2}), "seed is not a known key (value 2); it belongs in default_sampling_params"),
        (two_stages(connectors={"a": {"nam": "GrpcConnector"}}), "connectors.a.nam is not a known key"),
        (two_stages(dit={"qqq": 1}), "known: attention_backend, cpu_offload, default_sampling_params, "),
        (two_stages(dit={"stage_type": "diffusion"}), "what each stage does; leave it out"),
        (two_stages(dit={"default_sampling_params": {"do_sample": True}}), "params.do_sample is not a known key"),
        (two_stages(pipeline="bagle"), "unknown pipeline 'bagle'; known: bagel, bagel_think"),
        ({"stages": 3}, "stages is 3; it must be a list"),
        ({"stages": [{"devices": "0"}]}, "stages[stage_id=?].stage_id is missing"),
        ({1: 2}, "1 is 1; it must be a word"),
    ],
)  # fmt: skip
def test_an_unknown_or_missing_key_is_named(data: dict[str, Any], message: str) -> None:
    assert message in problem_of(data)


def test_the_known_keys_are_listed_once() -> None:
    problem = problem_of(two_stages(dit={"qqq": 1, "qqr": 2}))
    assert "qqr is not a known key (value 2)" in problem and problem.count("; known: ") == 1


def test_all_problems_of_a_file_are_told_at_once() -> None:
    told = problem_of(two_stages({"max_num_seqs": 0, "engine_args": {}}, {"runtime": {}, "devicse": "0"}))
    assert re.search(r"engine_args is .*; write its keys beside stage_id; .*runtime is .*; write devices beside", told)
    assert re.search(r"devicse is .*; did you mean devices\?; stages\[stage_id=0\]\.max_num_seqs is 0", told)
    unbuilt = two_stages(dit={"parallel_config": {"data_parallel_size": 2}}, async_chunk=True)
    told_of = r"async_chunk is True, .*; stages\[stage_id=1\]\.parallel_config\.data_parallel_size is 2"
    with pytest.raises(NotSupported, match=told_of):
        refuse_unbuilt(parse_deploy_config(unbuilt))
    assert problem_of({f"key{n}": 0 for n in range(20)}).endswith("more")


# What must fit together


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stages": [{"stage_id": 0}]}, "the stage_ids are [0]; bagel has exactly 0 (thinker), 1 (dit)"),
        ({"stages": []}, "the stage_ids are []"),
        (two_stages(pipeline="bagel_single_stage"), "[0, 1]; bagel_single_stage has exactly 0 (dit)"),
        ({"stages": [{"stage_id": 0}, {"stage_id": 0}]}, "the stage_ids are [0, 0]; each must be there once"),
    ],
)
def test_stage_ids_are_the_pipelines(data: dict[str, Any], message: str) -> None:
    assert message in problem_of(data)


@pytest.mark.parametrize(
    ("dit", "message"),
    [
        ({"tensor_parallel_size": 2, "parallel_config": {"tensor_parallel_size": 1}}, "state only one"),
        ({"parallel_config": {"vae_patch_parallel_size": 2}}, "it must be at most the stage's world size 1"),
        ({"parallel_config": {"use_hsdp": True}}, "parallel_config.hsdp_shard_size is 1; use_hsdp shards"),
        ({"parallel_config": {"hsdp_shard_size": 2}}, "parallel_config.use_hsdp is False; it must be true"),
        ({"parallel_config": {"hsdp_replicate_size": 2}}, "parallel_config.use_hsdp is False; it must be true"),
        ({"tensor_parallel_size": 2}, "devices is '0'; it must list a GPU for each rank of world size 2, like \"0,1\""),
        ({"devices": "0,1"}, "devices is '0,1'; it must list a GPU for each rank of world size 1, like \"0\""),
        ({"default_sampling_params": {"top_p": 0.9}}, "top_p is set; this stage writes no text, set it on stage 0"),
    ],
)
def test_contradictions_are_named(dit: dict[str, Any], message: str) -> None:
    assert message in problem_of(two_stages(dit=dit))


@pytest.mark.parametrize(
    ("thinker", "message"),
    [
        ({"parallel_config": {"vae_patch_parallel_size": 2}}, "parallel_config.vae_patch_parallel_size is 2"),
        ({"parallel_config": {"cfg_parallel_size": 2}}, "parallel_config.cfg_parallel_size is 2"),
        ({"parallel_config": {"use_hsdp": True, "hsdp_shard_size": 2}}, "parallel_config.use_hsdp is True"),
        ({"vae_use_tiling": True}, "vae_use_tiling is True"),
        ({"attention_backend": "fa2"}, "attention_backend is fa2"),
    ],
)
def test_settings_of_the_dit_are_refused_on_the_thinker(thinker: dict[str, Any], message: str) -> None:
    assert f"stages[stage_id=0].{message}; it is for the DiT stage only" in problem_of(two_stages(thinker))


@pytest.mark.parametrize(
    ("dit", "ranks"),
    [
        ({"tensor_parallel_size": 2}, 2),
        ({"parallel_config": {"tensor_parallel_size": 2, "cfg_parallel_size": 2}}, 4),
        ({"parallel_config": {"use_hsdp": True, "hsdp_shard_size": 2, "hsdp_replicate_size": 3}}, 6),
    ],
)
def test_vae_patches_may_use_all_ranks_of_the_dit(dit: dict[str, Any], ranks: int) -> None:
    spread = {**dit.get("parallel_config", {}), "vae_patch_parallel_size": ranks}
    devices = ",".join(map(str, range(ranks)))
    deploy = parse_deploy_config(two_stages(dit={**dit, "devices": devices, "parallel_config": spread}))
    assert deploy.stage(1).world_size == ranks
    spread["vae_patch_parallel_size"] += 1
    assert f"world size {ranks}" in problem_of(two_stages(dit={**dit, "devices": devices, "parallel_config": spread}))


def test_a_request_has_one_seed() -> None:
    seed = {"default_sampling_params": {"seed": 52}}
    assert parse_deploy_config(two_stages(seed, seed)).sampling_defaults() == {"seed": 52}
    assert "different seeds" in problem_of(two_stages(seed, {"default_sampling_params": {"seed": 7}}))


# Start-up lines


def test_the_start_line_states_what_settings_come_to() -> None:
    spread = {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2}
    deploy = parse_deploy_config(two_stages(dit={"devices": "0,1", "parallel_config": spread}))
    sizes = "tensor_parallel_size 2, cfg_parallel_size 1, context_parallel_size 1, vae_patch_parallel_size 2, hsdp off"
    assert effective_settings(deploy.stage(1)) == f"stage 1: {sizes}, vae_use_tiling true"
    assert effective_settings(deploy.stage(0)).startswith("stage 0: tensor_parallel_size 1, ")


def test_keys_without_meaning_are_noted_for_the_engine_that_has_none_for_them() -> None:
    keys = {
        "max_num_batched_tokens": 9,
        "gpu_memory_utilization": 0.4,
        "enable_prefix_caching": True,
    }
    common = {"max_model_len": 9, "max_num_seqs": 1, "enforce_eager": True}
    stages = {**keys, **common}, {"enable_prefix_caching": True, **common}
    deploy = parse_deploy_config(two_stages(*stages))
    thinker = f"stages[stage_id=0]: no meaning for the torch engine, only for vLLM: {', '.join(keys)}"
    dit = "stages[stage_id=1]: no meaning for the torch engine, only for vLLM: enable_prefix_caching"
    assert deploy.notes() == with_overrides(deploy, engine="torch").notes() == [thinker, dit]
    assert with_overrides(deploy, engine="vllm").notes() == [dit]


def test_engine_is_the_thinkers(deploy: DeployConfig) -> None:
    assert [stage.engine for stage in deploy.stages] == [None, None]
    chosen = parse_deploy_config(two_stages({"engine": "vllm"}, {}))
    assert [stage.engine for stage in chosen.stages] == ["vllm", None]
    assert [stage.engine for stage in with_overrides(chosen, engine="torch").stages] == ["torch", None]
    with pytest.raises(ConfigError, match=r"stages\[stage_id=1\].engine is 'vllm'; it is the Thinker's, leave it out"):
        parse_deploy_config(two_stages({}, {"engine": "vllm"}))
    with pytest.raises(
        ConfigError, match=r"stages\[stage_id=0\].engine is 'sglang'; it must be one of 'auto', 'torch'"
    ):
        parse_deploy_config(two_stages({"engine": "sglang"}, {}))
    with pytest.raises(ConfigError, match="engine='vllm': engine is the Thinker's, and bagel_single_stage has none"):
        load_deploy_config(shipped_deploy_config("bagel_single_stage"), engine="vllm")


@pytest.mark.parametrize(
    "name", ["SharedMemoryConnector", "MooncakeConnector", "MooncakeTransferEngineConnector", "NixlConnector"]
)
def test_vllm_omnis_connectors_and_remote_code_are_noted(name: str) -> None:
    deploy = parse_deploy_config(
        two_stages(
            {"trust_remote_code": True},
            {"input_connectors": {"from_stage_0": "shm"}},
            connectors={"shm": {"name": name, "extra": {"port": 1}}, "grpc": {"name": "GrpcConnector", "extra": {}}},
        )
    )
    assert deploy.notes() == [
        f"connectors.shm: {name} is not used, K/V moves over gRPC (GrpcConnector)",
        "stages[stage_id=0]: trust_remote_code has no effect, no remote code is ever run",
    ]


def test_the_files_of_todays_vllm_omni_load(tmp_path: Path) -> None:
    """Its keys that mean nothing here are noted with the reason."""
    two = write(
        tmp_path,
        """
        async_chunk: false
        stages:
          - stage_id: 0
            hf_overrides:
              rope_parameters: {rope_type: default, mrope_section: [16, 24, 24]}
            limit_mm_per_prompt: {image: 4}
            max_num_batched_tokens: 32768
            max_num_seqs: 3
            trust_remote_code: true
            enable_prefix_caching: false
            enable_chunked_prefill: true
            devices: "0"
            output_connectors: {to_stage_1: mooncake_connector}
            default_sampling_params: {temperature: 0.1, top_p: 0.9, top_k: 1, max_tokens: 8192, seed: 52,
                                      detokenize: true, repetition_penalty: 1.03}
          - stage_id: 1
            max_num_seqs: 1
            enforce_eager: true
            enable_chunked_prefill: true
            devices: "1"
            input_connectors: {from_stage_0: mooncake_connector}
            default_sampling_params: {seed: 52}
        connectors:
          mooncake_connector: {name: MooncakeConnector, extra: {host: auto, segment: 64000000}}
        """,
    )
    told = "\n".join(load_deploy_config(two).notes())
    for key in ("hf_overrides", "limit_mm_per_prompt", "enable_chunked_prefill", "output_connectors"):
        assert re.search(rf"stages\[stage_id=0\]: {key} has no effect, \w+", told)
    one = write(
        tmp_path,
        """
        pipeline: bagel_single_stage
        stages:
          - stage_id: 0
            enforce_eager: true
            parallel_config: {pipeline_parallel_size: 1, data_parallel_size: 1, enable_expert_parallel: false,
                              sequence_parallel_size: 1, ulysses_degree: 1, ring_degree: 1, allgather_degree: 1,
                              hsdp_shard_size: -1}
        platforms:
          xpu: {stages: [{stage_id: 0, devices: "0,1", tensor_parallel_size: 2}]}
        """,
        "one.yaml",
    )
    assert any(note.startswith("platforms has no effect") for note in load_deploy_config(one).notes())
    one.write_text(one.read_text().replace("allgather_degree: 1", "allgather_degree: 4"))
    with pytest.raises(NotSupported, match=r"allgather_degree is 4, .*; only 1 works"):
        load_deploy_config(one)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (two_stages(connectors={"a": {"name": "Carrier"}}), "a: name is 'Carrier'; it must be GrpcConnector"),
        (two_stages(connectors={"a": {"name": "GrpcConnector", "extra": {"port": 1}}}), "extra is {'port': 1}"),
        (two_stages(dit={"input_connectors": {"from_stage_0": "a"}}), "is 'a'; it must be a name under connectors"),
        (two_stages(dit={"input_connectors": {"from_stage_1": "a"}}), "no input of this stage; it has from_stage_0"),
        (two_stages({"input_connectors": {"from_stage_0": "a"}}), "no input of this stage; it has none"),
    ],
)  # fmt: skip
def test_connectors_that_lead_nowhere(data: dict[str, Any], message: str) -> None:
    assert message in problem_of(data)


# Not built yet


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("parallel_config: {pipeline_parallel_size: 2}", "pipeline_parallel_size is 2, .*; only 1 works; tensor_paral"),
        ("parallel_config: {ulysses_degree: 2}", "ulysses_degree is 2, .*; only 1 works; context_parallel_size"),
    ],
)
def test_settings_that_are_not_built_are_refused(tmp_path: Path, stage: str, message: str) -> None:
    path = write(tmp_path, f"stages: [{{stage_id: 0}}, {{stage_id: 1, {stage}}}]")
    with pytest.raises(NotSupported, match=message) as caught:
        load_deploy_config(path)
    assert str(caught.value).startswith(f"{path}: stages[stage_id=1].")


def test_async_chunk_is_refused() -> None:
    with pytest.raises(NotSupported, match="async_chunk is True, which is not built yet; only false works"):
        refuse_unbuilt(parse_deploy_config(two_stages(async_chunk=True)))


def test_values_that_work_are_not_refused() -> None:
    spread = {"tensor_parallel_size": 1, "cfg_parallel_size": 1, "vae_patch_parallel_size": 1, "use_hsdp": False}
    stage = {"tensor_parallel_size": 1, "quantization": None, "parallel_config": spread}
    refuse_unbuilt(parse_deploy_config(two_stages(stage, stage)))


# Inheritance


def test_a_file_inherits_stage_by_stage(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    write(
        tmp_path,
        """
        stages:
          - {stage_id: 0, max_num_seqs: 3, default_sampling_params: {top_p: 0.9, seed: 52}}
          - {stage_id: 1, max_num_seqs: 3, vae_use_tiling: true}
        connectors: {shm: {name: SharedMemoryConnector, extra: {size: 1}}}
        """,
        "grandparent.yaml",
    )
    write(tmp_path, "base_config: grandparent.yaml\npipeline: bagel_think", "base.yaml")
    child = """
        base_config: ../base.yaml
        stages:
          - {stage_id: 1, max_num_seqs: 1}
          - {stage_id: 0, default_sampling_params: {top_p: 0.5, seed: null}}
        connectors: {shm: {extra: {port: 2}, name: SharedMemoryConnector}, grpc: {name: GrpcConnector}}
        """
    deploy = load_deploy_config(write(tmp_path / "deeper", child))
    assert deploy.pipeline == "bagel_think"
    assert deploy.sampling_defaults() == {"top_p": 0.5}
    assert (deploy.stage(0).max_num_seqs, deploy.stage(1).max_num_seqs) == (3, 1)
    assert deploy.stage(1).vae_use_tiling
    assert deploy.connectors["shm"].extra == {"size": 1, "port": 2}
    assert list(deploy.connectors) == ["shm", "grpc"]


def test_bagel_think_is_bagel_but_for_the_pipeline() -> None:
    plain, think = (load_deploy_config(shipped_deploy_config(name)) for name in ("bagel", "bagel_think"))
    assert think.stages == plain.stages and think.connectors == plain.connectors


def test_a_problem_is_reported_with_the_file_that_holds_it(tmp_path: Path) -> None:
    base = write(tmp_path, "stages: [{stage_id: 0, max_num_seqs: two}]", "base.yaml")
    with pytest.raises(ConfigError) as caught:
        load_deploy_config(write(tmp_path, "base_config: base.yaml"))
    assert str(caught.value) == f"{base}: stages[stage_id=0].max_num_seqs is 'two'; it must be a whole number"


def test_a_stage_that_is_there_twice_in_one_file_does_not_vanish(tmp_path: Path) -> None:
    write(tmp_path, "stages: [{stage_id: 0}, {stage_id: 1}]", "base.yaml")
    child = "base_config: base.yaml\nstages: [{stage_id: 1, max_num_seqs: 1}, {stage_id: 1, max_num_seqs: 2}]"
    with pytest.raises(ConfigError, match="each must be there once"):
        load_deploy_config(write(tmp_path, child))


def test_files_that_inherit_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "base_config: mine.yaml", "other.yaml")
    with pytest.raises(ConfigError, match=r"circle, mine\.yaml -> other\.yaml -> mine\.yaml; remove one"):
        load_deploy_config(write(tmp_path, "base_config: other.yaml"))


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: .*; correct base_config in .*mine\.yaml"):
        load_deploy_config(write(tmp_path, "base_config: none.yaml"))


# Overrides


@pytest.fixture
def deploy() -> DeployConfig:
    return load_deploy_config(shipped_deploy_config("bagel"))


def test_an_override_goes_to_the_stages_it_means_something_to(deploy: DeployConfig) -> None:
    changed = with_overrides(
        deploy, max_num_seqs=7, vae_use_tiling=True, devices=None, attention_backend="sdpa", enforce_eager=True
    )
    assert [stage.max_num_seqs for stage in changed.stages] == [7, 7]
    assert [stage.vae_use_tiling for stage in changed.stages] == [False, True]
    assert [stage.attention_backend for stage in changed.stages] == [None, "sdpa"]
    dit, thinker = changed.stage(1).settings(DitConfig), changed.stage(0).settings(ThinkerConfig)
    assert (dit["attention_backend"], dit["enforce_eager"], thinker["enforce_eager"]) == ("sdpa", True, True)
    assert [stage.devices for stage in changed.stages] == ["0", "0"]
    assert [stage.max_num_seqs for stage in deploy.stages] == [3, 3]
    assert changed.connectors == deploy.connectors


def test_weights_are_divided_or_kept_on_the_host() -> None:
    spread = {"use_hsdp": True, "hsdp_shard_size": 2}
    told = problem_of(two_stages(dit={"cpu_offload": "layers", "devices": "0,1", "parallel_config": spread}))
    assert "cpu_offload is layers; use_hsdp divides the weights over GPUs instead, leave out one" in told


def test_offload_goes_to_the_dit_alone(deploy: DeployConfig) -> None:
    changed = with_overrides(deploy, cpu_offload="layers")
    assert [stage.cpu_offload for stage in changed.stages] == [None, "layers"]
    assert changed.stage(1).settings(DitConfig)["cpu_offload"] == "layers"
    thinker = problem_of(two_stages({"cpu_offload": "layers"}))
    assert "cpu_offload is layers; it is for the DiT stage only, leave it out here" in thinker


def test_quantization_goes_to_the_dit_and_to_a_thinker_on_vllm(deploy: DeployConfig) -> None:
    """The torch engine has none, so that asking for a smaller DiT must not refuse the Thinker beside it."""
    for engine, thinkers in (("torch", None), (None, None), ("vllm", "fp8")):
        changed = with_overrides(deploy, quantization="fp8", engine=engine)
        assert [stage.quantization for stage in changed.stages] == [thinkers, "fp8"]
        assert changed.stage(1).settings(DitConfig)["quantization"] == "fp8"
        # Where the Thinker is not, also one that "auto" takes vLLM for, it is said.
        told = [note for note in changed.notes() if "the Thinker is not quantised, fp8 is the DiT's alone" in note]
        assert changed.notes() == told and len(told) == (thinkers is None)
    assert with_overrides(deploy, engine="vllm").notes() == []


def test_overrides_of_the_embedded_api(deploy: DeployConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "NOT_BUILT", ())
    given = {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2, "vae_use_tiling": True}
    changed = with_overrides(deploy, **given)
    assert [stage.tp_size for stage in changed.stages] == [1, 2]  # a Thinker on torch has one GPU
    assert [stage.devices for stage in changed.stages] == ["0", "0,1"]  # those that follow the file's
    assert [stage.parallel_config.vae_patch_parallel_size for stage in changed.stages] == [1, 2]
    assert [stage.tiling for stage in changed.stages] == [False, True]
    changed = with_overrides(deploy, **given, engine="vllm")
    assert [stage.world_size for stage in changed.stages] == [2, 2]
    assert [stage.devices for stage in changed.stages] == ["0,1", "0,1"]
    with pytest.raises(ConfigError, match='like "0,1"'):
        with_overrides(deploy, **given, engine="vllm", devices="3")
    chosen = with_overrides(deploy, **given, engine="vllm", devices="3,1")
    assert [stage.device_ids for stage in chosen.stages] == [(3, 1), (3, 1)]


@pytest.mark.parametrize(
    ("thinker", "dit", "now"), [("0", "1", ["0,1", "2,3"]), ("1", "0", ["1,2", "0,3"]), ("1", "1", ["1,2", "1,2"])]
)
def test_stages_with_gpus_of_their_own_keep_apart_when_they_get_more_ranks(
    thinker: str, dit: str, now: list[str]
) -> None:
    deploy = parse_deploy_config(two_stages(thinker={"devices": thinker}, dit={"devices": dit}))
    changed = with_overrides(deploy, tensor_parallel_size=2, engine="vllm")
    assert [stage.devices for stage in changed.stages] == now


def test_an_override_replaces_the_size_in_parallel_config(tmp_path: Path) -> None:
    spread = "parallel_config: {tensor_parallel_size: 2}"
    path = write(tmp_path, f"stages: [{{stage_id: 0, {spread}}}, {{stage_id: 1, {spread}}}]")
    changed = load_deploy_config(path, tensor_parallel_size=1)
    assert [stage.tp_size for stage in changed.stages] == [1, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"vae_use_tilin": True}, "vae_use_tilin is not a known setting; did you mean vae_use_tiling?"),
        ({"stage_id": 3}, "stage_id is not a known setting"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size is '2'; it must be a whole number"),
        ({"quantization": "int4"}, "quantization is 'int4'; the DiT has fp8"),
        ({"cfg_parallel_size": 4}, "parallel_config.cfg_parallel_size is 4; it must be from 1 to 3"),
    ],
)
def test_a_wrong_override_is_named(deploy: DeployConfig, override: dict[str, Any], message: str) -> None:
    (name, value) = next(iter(override.items()))
    with pytest.raises((ConfigError, NotSupported)) as caught:
        with_overrides(deploy, **override)
    assert message in str(caught.value) and f"bagel.yaml with {name}={value!r}" in str(caught.value)


def test_yaml_nested_too_deeply_is_told_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "stages: " + "[" * 5000)
    with pytest.raises(ConfigError) as caught:
        load_deploy_config(path)
    assert "\n" not in str(caught.value)
