"""Settings of the services as flags of `bagel serve`: what it does not set itself is taken, checked, and passed on.

A new setting of a service is a flag here without a line of code. No torch here.
"""

from __future__ import annotations

import argparse
from typing import Any

from bagel.deployment.configs import CONFIGS
from bagel.deployment.settings import given, settings_of

SERVES_OWN = ("model", "engine", "quantization", "cpu_offload", "cfg_parallel_size")
"""Settings that `serve` has flags for, and works out by itself: which checkpoint it is, what the deploy file says."""
_ALL = [each for config in CONFIGS.values() for each in settings_of(config)]
NOT_PASSED = {each.flag: each.elsewhere for each in _ALL if each.elsewhere}
"""Flags of services that `serve` does not take, with what they are instead."""


def add_service_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the services to those that a parser has already."""
    taken = {name for action in parser._actions for name in action.option_strings}
    for role, config in CONFIGS.items():
        group = parser.add_argument_group(f"passed on to the {role}")
        for each in settings_of(config):
            if each.flag not in taken and not each.elsewhere:
                # Services share settings: the first that has a flag adds it for all.
                taken.add(each.flag)
                each.add_to(group, required=False)


def asked_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of services that the flags of `serve` say, by the names of their fields."""
    return given(vars(args), [each for each in _ALL if each.name not in SERVES_OWN])
