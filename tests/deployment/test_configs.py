"""One field of a configuration is all that a setting needs: its flag, its checks, its way to a child, its log line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bagel.arguments import for_command_line
from bagel.deployment.configs import CONFIGS
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.process import Service
from bagel.deployment.schema import ParallelConfig, StageDeploy
from bagel.deployment.settings import JSON_FLAG, Config, Setting, setting, settings_of
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.errors import ConfigError

ROOT = Path(__file__).parents[2]
LIMIT_S = 60
TEXTS = {
    "--pipeline": "bagel_think",
    "--http": "127.0.0.1:9",
    "--sampling-defaults": '{"steps": 9}',
    "--tls-server-name": "thinker-0=a",
    "--source": "thinker-1=a:1",
    "--thinker": "thinker-0=a:1",
    "--dit": "dit-0=a:1",
    "--gpu-memory-utilization": "0.5",
    "--allow-origin": "https://a.example",
    "--max-bytes-in-flight": str(2**40),
    "--tensor-parallel-size": "2",
    "--cfg-parallel-size": "2",
    "--context-parallel-size": "2",
    "--vae-patch-parallel-size": "4",
    "--hsdp-shard-size": "2",
    "--hsdp-replicate-size": "2",
    "--ray-address": "10.0.0.5:6379",
}
"""Of settings that not any text or number will do for."""


@dataclass(frozen=True, kw_only=True)
class Grown(DitConfig):
    """A DiT with one more setting, written as any other: one field."""

    warm_up_steps: int = setting("steps of a trial picture before the service is ready", default=0, at_least=0)


def text_of(each: Setting) -> str:
    """A text for a flag that is not its default."""
    if each.flag in TEXTS:
        return TEXTS[each.flag]
    if each.choices is not None:
        return str([choice for choice in each.choices if choice != each.default][-1])
    return str(int((each.at_most or 99) - 2)) if each.kind in (int, float) else "mine"


HSDP = {"use_hsdp", "hsdp_shard_size", "hsdp_replicate_size"}
APART = [HSDP, {"tensor_parallel_size"}]
"""Settings that do not go together."""


def changed(config: type[Config], without: Collection[str] = HSDP) -> list[str]:
    """Flags that change every setting but those."""
    several = [each for each in settings_of(config) if each.name not in without]
    switches = [each.flag for each in several if each.kind is bool]
    return [*switches, *(f"{each.flag}={text_of(each)}" for each in several if each.kind is not bool)]


@pytest.mark.parametrize("without", APART)
@pytest.mark.parametrize("config", [*CONFIGS.values(), Grown])
def test_every_setting_is_a_flag_reaches_another_process_and_is_in_the_log(
    config: type[Config], without: Collection[str]
) -> None:
    made = config.read(changed(config, without))
    for each in settings_of(config):
        assert each.name in without or getattr(made, each.name) not in (each.default, None), each.flag
    assert config.from_json(made.to_json()) == made
    assert config.read([JSON_FLAG, made.to_json()]) == made
    assert made.shown().keys() == {each.flag.strip("-").replace("-", "_") for each in settings_of(config)}


def test_a_child_gets_its_configuration_whole_and_no_other_user_sees_it(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import json, sys\n"
        "from bagel.deployment.dit_config import DitConfig\n"
        "config = DitConfig.read(sys.argv[1:])\n"
        "seen = open('/proc/self/cmdline').read()\n"
        "print(json.dumps({'event': 'listening', 'address': config.to_json(), 'http': seen}), flush=True)\n"
    )
    made = DitConfig.read(changed(DitConfig))
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    service = Service("told-0", "a service", "told", [JSON_FLAG, made.to_json()], env, None)
    try:
        assert DitConfig.from_json(service.address(time.monotonic() + LIMIT_S)) == made
        assert "told" in service.http and "mine" not in service.http
    finally:
        service.end(LIMIT_S)


@pytest.mark.parametrize("config", CONFIGS.values())
def test_every_setting_that_is_a_stages_is_a_key_of_the_deploy_file(config: type[Config]) -> None:
    for each in settings_of(config):
        assert each.stage == (each.name in StageDeploy.model_fields), each.name
        assert not each.section or each.name in ParallelConfig.model_fields, each.name


@pytest.mark.parametrize("config", CONFIGS.values())
def test_every_setting_is_in_the_docs(config: type[Config]) -> None:
    docs = "".join(path.read_text() for path in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])
    for each in settings_of(config):
        assert re.search(rf"{each.flag}(?![a-z-])", docs), f"{each.flag} is not in the docs"


@pytest.mark.parametrize(
    ("config", "values", "told"),
    [
        (DitConfig, {"max_num_seqs": 0}, "--max-num-seqs is 0; it must be at least 1"),
        (DitConfig, {"step_timeout_s": 0}, "--step-timeout is 0; it must be above 0 seconds"),
        (DitConfig, {"kv_page_timeout_s": float("inf")}, "--kv-page-timeout is inf; it must be above 0 seconds"),
        (DitConfig, {"max_model_len": "9"}, "--max-model-len is '9'; it must be a whole number"),
        (DitConfig, {"single_stage": 1}, "--single-stage is 1; it must be true or false"),
        (DitConfig, {"dtype": "int4"}, "--dtype is 'int4'; it must be one of auto, bfloat16, float32"),
        (DitConfig, {"sources": "thinker-0=a:1"}, "--source is 'thinker-0=a:1'; it must be a list"),
        (DitConfig, {"cfg_parallel_size": 4}, "--cfg-parallel-size is 4; it must be from 1 to 3"),
        (DitConfig, {"vae_patch_parallel_size": 2}, "--vae-patch-parallel-size is 2; it must be at most the stage's w"),
        (DitConfig, {"use_hsdp": True}, "--hsdp-shard-size is 1; use_hsdp shards over that many GPUs, it must"),
        (DitConfig, {"hsdp_shard_size": 2}, "--use-hsdp is False; it must be true for"),
        (DitConfig, {"use_hsdp": True, "tensor_parallel_size": 2}, "--use-hsdp is True with tensor_parallel_size 2"),
        (DitConfig, {"use_hsdp": True, "cfg_parallel_size": 3, "hsdp_shard_size": 2}, "--hsdp-shard-size is 2 and"),
        (DitConfig, {"tensor_parallel_size": 2, "device": "cuda:1"}, "--device is cuda:1, one GPU, for 2 ranks"),
        (DitConfig, {"ray_address": "a:1"}, "--ray-address is 'a:1', with process as worker backend; it must be ray"),
        (DitConfig, {"worker_backend": "ray", "ray_address": "ray://a:1"}, "--ray-address is 'ray://a:1'; it must be"),
        (DitConfig, {"sources": ("x",)}, "--source is 'x'; it must be NAME=HOST:PORT, like"),
        (ThinkerConfig, {"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization is 1.5; it must be above 0 and at"),
        (GatewayConfig, {"header_timeout_s": 0}, "--header-timeout is 0; it must be from 0.1 to 86400 seconds"),
        (GatewayConfig, {"max_connections": 7}, "--max-connections has no effect without --http"),
        (GatewayConfig, {"max_images": 9}, "--max-images is 9; it must be from 1 to 8"),
        (GatewayConfig, {"max_bytes_in_flight": 5}, "--max-bytes-in-flight is 5; it must be at least"),
    ],
)
def test_a_wrong_value_is_told_by_its_flag_and_the_reason(
    config: type[Config], values: dict[str, Any], told: str
) -> None:
    needed = {"thinkers": ("thinker-0=a:1",), "dits": ("dit-0=a:1",)} if config is GatewayConfig else {"model": "m"}
    with pytest.raises(ConfigError) as wrong:
        config(**needed, **values)
    assert for_command_line(wrong.value).startswith(told)
    with pytest.raises(ConfigError):
        config.from_json(json.dumps({**needed, **values}))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([JSON_FLAG, "{"], "--config-json is no configuration of bagel_dit"),
        ([JSON_FLAG, "7"], "--config-json is no configuration of bagel_dit"),
        ([JSON_FLAG, '{"modle": "x"}'], "bagel_dit has no setting 'modle'"),
        ([JSON_FLAG, "{}", "--model", "x"], "give no other flag beside it"),
        (["--max-num-seqs", "0", "--model", "x"], "'0' is no whole number of at least 1"),
        (["--step-timeout", "x", "--model", "x"], "'x' is no number of seconds above 0"),
        ([], "required: --model"),
    ],
)
def test_arguments_that_say_nothing_are_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        DitConfig.read(arguments)
