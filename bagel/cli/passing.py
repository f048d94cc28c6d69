"""Flags of the services that `bagel serve` starts: taken as its own, checked, and passed on. No torch here.

Whatever the gateway, the Thinker and the DiT have that `serve` does not set itself is a flag of `serve` too, so that a
new one needs no line here. What the gateway has is its alone, but what every process needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from bagel.errors import ConfigError

PARSERS = {"gateway": "bagel_gateway.settings", "thinker": "bagel_thinker.__main__", "dit": "bagel_dit.__main__"}
"""Where each role's `parser` is, by name: nothing here imports a service."""
EVERYWHERE = ("--log-level", "--image-workers", "--image-timeout")
_DEPLOY = "a setting of a stage; write it into the deploy file of --deploy-config"
_WIRED = "set by bagel serve, which starts the services and connects them"
NOT_PASSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("--max-num-seqs", "--max-model-len", "--vae-use-tiling", "--tensor-parallel-size", "--quantization"), _DEPLOY
    ),
    **dict.fromkeys(
        ("--gpu-memory-utilization", "--max-num-batched-tokens", "--enforce-eager", "--enable-prefix-caching"), _DEPLOY
    ),
    "--sampling-defaults": "the default_sampling_params of the deploy file's stages",
    "--pipeline": "the pipeline of the deploy file",
    "--listen": "--host and --port here",
    "--role": "of a Thinker that draws nothing; start python -m bagel_thinker by itself",
    **dict.fromkeys(("--name", "--thinker", "--dit", "--source", "--single-stage"), _WIRED),
    **dict.fromkeys(("--tls-any-client", "--tls-server-name", "--plaintext-services", "--plaintext-front"), _WIRED),
}
"""Flags of services that `serve` does not take, with what they are instead."""
OF_HTTP = ("--allow-image-host",)
"""Flags that say nothing without --http."""


def add_service_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the services to those that a parser has already; services that are not installed have none."""
    taken = {name for action in parser._actions for name in action.option_strings}
    passed: dict[str, tuple[str, ...]] = {}
    groups = {role: parser.add_argument_group(f"passed on to the {role}") for role in PARSERS}
    for role, action in _flags():
        name = action.option_strings[0]
        if name in taken or name in NOT_PASSED:
            continue
        if name not in passed:
            passed[name] = (role,)
            _add(groups[role], action)
        elif name in EVERYWHERE or "gateway" not in passed[name]:
            passed[name] += (role,)
    parser.set_defaults(passed=passed)


def passed_arguments(args: argparse.Namespace, started: Collection[str]) -> dict[str, list[str]]:
    """What each role is started with beside what `serve` sets.

    Raises ConfigError for a flag of a role that is not started, or of HTTP without --http.
    """
    arguments: dict[str, list[str]] = {role: [] for role in PARSERS}
    for name, roles in args.passed.items():
        value = getattr(args, name.removeprefix("--").replace("-", "_"))
        if value is None:
            continue
        if name in OF_HTTP and args.http is None:
            raise ConfigError(f"{name} is of the HTTP front, which is not asked for; add --http HOST:PORT")
        if not set(roles) & set(started):
            raise ConfigError(f"{name} is of the {roles[0]}, which this deploy file does not start; leave it out")
        several = value if isinstance(value, list) else [value]
        for role in roles:
            arguments[role] += [name] if value is True else [f"{name}={each}" for each in several]
    return arguments


def _flags() -> list[tuple[str, argparse.Action]]:
    """Every flag of every installed service, with its role."""
    found: list[tuple[str, argparse.Action]] = []
    for role, module in PARSERS.items():
        with suppress(ModuleNotFoundError):
            parser: argparse.ArgumentParser = import_module(module).parser()
            found += [(role, action) for action in parser._actions if action.option_strings and action.dest != "help"]
    return found


def _add(group: argparse._ArgumentGroup, action: argparse.Action) -> None:
    name, help_ = action.option_strings[0], action.help
    if isinstance(action, argparse._StoreTrueAction):
        group.add_argument(name, action="store_true", default=None, help=help_)
        return
    several = "append" if isinstance(action, argparse._AppendAction) else "store"
    kind = _as_written(action.type) if callable(action.type) else str
    more: dict[str, Any] = {"metavar": action.metavar, "choices": action.choices}
    group.add_argument(name, action=several, type=kind, default=None, help=help_, **more)


def _as_written(kind: Callable[[str], Any]) -> Callable[[str], str]:
    """Checks a value as the service will, and keeps it as it was written."""

    def check(text: str) -> str:
        kind(text)
        return text

    check.__name__ = getattr(kind, "__name__", "value")  # argparse names it in errors
    return check
