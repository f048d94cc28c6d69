"""The configurations of the three services, and which of them a deployment's setting goes to. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.settings import Config, Setting, settings_of
from bagel.deployment.thinker_config import ThinkerConfig

GATEWAY = "gateway"
CONFIGS: Mapping[str, type[Config]] = {GATEWAY: GatewayConfig, "thinker": ThinkerConfig, "dit": DitConfig}
"""The configuration class of each role."""


def settings_named(name: str) -> dict[str, Setting]:
    """The settings of a field's name, by the role of the services that a whole deployment gives it to.

    The gateway alone where it has the setting, unless that is for every service: what bounds and guards the callers'
    port is not for the ports behind it.
    """
    having = {role: each for role, config in CONFIGS.items() for each in settings_of(config) if each.name == name}
    return {GATEWAY: having[GATEWAY]} if GATEWAY in having and not having[GATEWAY].everywhere else having
