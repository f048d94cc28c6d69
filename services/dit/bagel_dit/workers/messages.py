"""Messages between a rank and its server, beside the commands and events of its engine. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bagel.engine.commands import Command
from bagel.engine.events import Event
from bagel.errors import BagelError

SILENCE_S = 30.0
"""Once its model is loaded, a rank that has sent nothing for so long is dead."""
GROUP_SILENCE_S = 10.0
"""The same of a rank of several, for which all others wait: ten signs of life that did not come."""
STOPPED_S = 2.0
"""A rank of several that is stopped by a signal for so long is killed."""


@dataclass(frozen=True)
class Stop:
    """End the process."""


@dataclass(frozen=True)
class Ready:
    """The model is loaded: a serialized ModelInfo, and bytes of weights by component.

    kv_tokens: tokens of K/V that its device has room for; devices: of all ranks, in their order.
    """

    info: bytes
    memory: Mapping[str, int]
    kv_tokens: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class LoadFailed:
    """The model could not be loaded. The process ends."""

    error: BagelError


@dataclass(frozen=True)
class Alive:
    """The process runs; sent about every second."""


@dataclass(frozen=True)
class Hung:
    """A thread has made no progress for the step timeout. stack: where it is; loading: whether it loads the model."""

    loading: bool
    stack: str


Order = Command | Stop
Report = Event | Ready | LoadFailed | Alive | Hung
