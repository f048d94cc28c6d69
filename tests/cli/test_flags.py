"""The flags: their names, what the help calls their defaults, and docs/options.md saying the same."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from bagel.arguments import Parser
from bagel.cli import flags, main
from bagel.cli.passing import add_service_flags, asked_settings
from bagel.deployment.configs import CONFIGS
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.deployment.settings import settings_of
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.prompts import TextPart
from bagel.request import (
    ImageSettings,
    Modality,
    PosteriorMode,
    RenormType,
    Request,
    TextSettings,
    resolve,
)
from bagel_thinker.__main__ import main as thinker
from tests.conftest import GOLDEN

ROOT = Path(__file__).parents[2]
HEAVY = (
    "pydantic",
    "yaml",
    "rich",
    "numpy",
    "PIL",
    "torch",
    "transformers",
    "diffusers",
    "bagel.deployment.deploy_file",
)


def actions() -> Iterator[argparse.Action]:
    parser = Parser()
    flags.add_generate_flags(parser)
    return (action for action in parser._actions if action.dest != "help")


def shown_defaults() -> dict[str, str]:
    """What the help calls each flag's default."""
    found = {action.option_strings[0]: re.search(r"\(default: (.*)\)$", action.help or "") for action in actions()}
    return {flag: match[1] for flag, match in found.items() if match}


# Of vllm-omni's BAGEL example and this project's feature list: users find their command lines again.
PROMISED = {
    "--modality": "text2img",
    "--prompts": "none",
    "--txt-prompts": "none",
    "--image-path": "none",
    "--output": ".",
    "--height": "the model's; an edit: the resized input's",
    "--width": "the model's; an edit: the resized input's",
    "--steps": "50",
    "--seed": "none, each prompt draws its own",
    "--think": "off",
    "--max-think-tokens": "1000",
    "--do-sample": "off",
    "--text-temperature": "0.3",
    "--cfg-text-scale": "4.0",
    "--cfg-img-scale": "1.5 for edits, else 1.0",
    "--negative-prompt": "none",
    "--cfg-parallel-size": "1",
    "--cfg-interval": "0.4 1.0; edits 0.0 1.0",
    "--cfg-renorm-type": "global; edits text_channel",
    "--cfg-renorm-min": "0.0",
    "--deploy-config": "the shipped bagel_single_stage.yaml",
    "--worker-backend": "process",
    "--ray-address": "none, a Ray of this host",
    "--quantization": "none",
    "--log-stats": "off",
    "--init-timeout": "300",
    "--batch-timeout": "5",
    "--enable-diffusion-pipeline-profiler": "off",
}


def test_promised_flags_have_their_names_and_defaults() -> None:
    assert PROMISED.items() <= shown_defaults().items()


def test_shown_defaults_are_those_of_a_request() -> None:
    shown = shown_defaults()
    for cls in (TextSettings, ImageSettings, Request):
        for field in fields(cls):
            flag = {"temperature": "--text-temperature"}.get(field.name, flags.flag_name(field.name))
            if flag in shown and isinstance(field.default, int | float) and not isinstance(field.default, bool):
                assert re.split("[ ,]", shown[flag].removeprefix("1.5 for edits, else "))[0] == str(field.default), flag
    drawn, edited = (resolve(kind, (TextPart("x"),), {}).image for kind in (Modality.TEXT2IMG, Modality.IMG2IMG))
    assert shown["--cfg-interval"] == "{} {}; edits {} {}".format(*drawn.cfg_interval, *edited.cfg_interval)
    assert shown["--cfg-renorm-type"] == f"{drawn.cfg_renorm_type}; edits {edited.cfg_renorm_type}"
    assert shown["--cfg-img-scale"] == f"{edited.cfg_img_scale} for edits, else {drawn.cfg_img_scale}"


def test_choices_are_those_of_a_request() -> None:
    assert tuple(Modality) == flags.MODALITIES
    assert tuple(RenormType) == flags.RENORM_TYPES
    assert tuple(PosteriorMode) == flags.POSTERIOR_MODES


def test_no_flag_has_a_default_that_hides_the_deploy_files() -> None:
    assert {action.default for action in actions()} == {None}


def test_help_of_generate_is_short_at_its_start_and_ends_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("\n") < 120 and text.startswith("usage: bagel generate --prompts TEXT")
    *_, examples = text.partition("examples:\n")
    assert [line.split()[:2] for line in examples.splitlines()] == [["bagel", "generate"]] * 3


def test_documentation_lists_every_flag_with_its_default() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| [^|]+ \| ([^|]+) \|", (ROOT / "docs/options.md").read_text(), re.M)
    assert dict(rows) == shown_defaults()


@pytest.mark.parametrize("command", ["--help", "generate --help", "--version"])
def test_help_loads_nothing_slow(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bagel.cli", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert not loaded & set(HEAVY)
    assert "bagel" in done.stdout


TWICE = [
    ("generate", "--prompts x --image-path a --image-path b", "--image-path: it is given twice, as 'a' and as 'b'"),
    ("generate", "--prompts x --steps 5 --steps 6", "--steps: it is given twice, as 5 and as 6"),
    ("generate", "--prompts x --cfg-interval 0.1 0.3 --cfg-interval 0.2 0.3", "0.1 0.3 and 0.2 0.3"),
    ("serve", "--port 1 --port 2", "--port: it is given twice"),
    ("health", "--endpoint a:1 --endpoint b:1", "--endpoint: it is given twice"),
    ("eval-nano", "--seed 1 --seed 2", "--seed: it is given twice"),
]


@pytest.mark.parametrize(("command", "arguments", "said"), TWICE)
def test_no_flag_overrides_itself(command: str, arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *arguments.split()]) == 2
    assert said in capsys.readouterr().err


def test_flags_may_be_given_again_with_the_same_value_or_where_values_are_collected() -> None:
    parser = Parser()
    flags.add_generate_flags(parser)
    for _ in range(2):
        made = parser.parse_args("--think --steps 5 --prompts a --think --prompts b c --steps 5".split())
        assert (made.think, made.steps, made.prompts) == (True, 5, ["a", "b", "c"])


def test_a_switch_and_its_opposite_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert thinker(["--model", "x", "--enforce-eager", "--no-enforce-eager"]) == 2
    assert "it is given twice, --enforce-eager and --no-enforce-eager" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--prompts", "x", "--negative-prompt", "-x"], "as in --negative-prompt=-x;"),
        (["--prompts", "-x"], "as in --prompts=-x;"),
        (["--prompts", "a", "-x"], "as in --prompts=-x;"),
        (["--prompts", "a", "--output", "--steps"], "expected one argument; see"),
    ],
)
def test_a_value_that_begins_with_a_dash_is_told_how_to_be_given(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments]) == 2
    assert hint in capsys.readouterr().err
    parser = Parser()
    flags.add_generate_flags(parser)
    made = parser.parse_args(["--prompts=-x", "--negative-prompt=-y"])
    assert (made.prompts, made.negative_prompt) == (["-x"], "-y")


def test_serve_takes_every_flag_of_the_services_or_says_what_it_is_instead() -> None:
    serve = Parser()
    flags.add_serve_flags(serve)
    add_service_flags(serve)
    taken = {name for action in serve._actions for name in action.option_strings}
    for each in (each for config in CONFIGS.values() for each in settings_of(config)):
        assert each.flag in taken or each.elsewhere, each.flag
    several = "--allow-image-host a --allow-image-host b --max-requests 3 --step-timeout 9 --log-level DEBUG"
    args = serve.parse_args([*several.split(), "--http", "127.0.0.1:0", "--kv-store-bytes", "99"])
    deploy = load_deploy_config(shipped_deploy_config("bagel"))
    made = Deployment(deploy, "m", **asked_settings(args))
    (thinker, dit), gateway = made._stages, made._gateway
    assert isinstance(thinker, ThinkerConfig)
    assert (gateway.allow_image_hosts, gateway.max_requests) == (("a", "b"), 3)
    assert (thinker.kv_store_bytes, thinker.step_timeout_s, dit.step_timeout_s) == (99, 9, 9)
    assert {each.log_level for each in (thinker, dit, gateway)} == {"DEBUG"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--max-num-seqs 3", "--max-num-seqs is no flag of bagel serve: a setting of a stage"),
        (
            "--no-enforce-eager --stage-id 1",
            "--enforce-eager is no flag of bagel serve: a setting of a stage; write it into the deploy file of "
            "--deploy-config; unknown flag '--stage-id'; start one stage with python -m",
        ),
        ("--served-model-nam x", "did you mean --served-model-name?"),
        ("--max-requests many", "--max-requests: 'many' is no whole number of at least 1"),
        ("--served-model-name x", "--served-model-name has no effect without --http"),
        ("--allow-image-host x", "--allow-image-host has no effect without --http; give --http"),
        ("--deploy-config deploy/bagel_single_stage.yaml --kv-store-bytes 9", "is of the thinker, which this deploy"),
    ],
)
def test_what_serve_does_not_pass_on_is_refused_by_name(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BAGEL_MODEL", str(GOLDEN / "checkpoint"))
    assert main(["serve", *arguments.split()]) == 2
    assert said in capsys.readouterr().err
