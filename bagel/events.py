"""What happens while requests are served, as an engine reports it. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image


@dataclass(frozen=True)
class Accepted:
    """A gateway took request `index`: its name in every log, its seed, and the pipeline that serves it.

    settings: every setting as it is used, by the names of bagel.request: what the user left open is filled in.
    """

    index: int
    request_id: str
    seed: int
    pipeline: str
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PrefillDone:
    """The contexts of request `index` are computed: `tokens` rows of K/V over all its distinct branches."""

    index: int
    tokens: int


@dataclass(frozen=True)
class DrawingStarted:
    """The picture of request `index` waits for its turn no more; it waited so many seconds."""

    index: int
    waited_s: float


@dataclass(frozen=True)
class TextDelta:
    """Some more text of request `index`; think is True for the text before a picture."""

    index: int
    text: str
    think: bool


@dataclass(frozen=True)
class StepDone:
    """Euler step `step` (from 1) of `steps` of request `index` is under way on the device; all before it are done."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """The picture of request `index` under way: its preview `number` (from 0), as it looked in Euler step `step`."""

    index: int
    number: int
    step: int
    image: Image


@dataclass(frozen=True)
class Result:
    """What request `index` came to.

    text: the reply, or the think text before a picture ("" if there is none); token_ids: its visible ids.
    timings: seconds by stage (context, text, denoise, decode). profile: seconds of the diffusion stages by the device's
    clock, in their order, where they are profiled. From a service also usage, tokens and steps by the
    names of bagel.v1.Usage, the request's name in its logs, and the settings of `Accepted`.
    """

    index: int
    image: Image | None
    text: str
    token_ids: tuple[int, ...]
    seed: int
    timings: Mapping[str, float] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)
    request_id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, float] = field(default_factory=dict)


Event = TextDelta | StepDone | Result
OnEvent = Callable[[Event], None]
ServiceEvent = Accepted | PrefillDone | DrawingStarted | Preview | Event
"""What a gateway reports beside."""
