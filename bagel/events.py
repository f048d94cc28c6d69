"""Events that an engine or a gateway reports while it serves requests. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image


@dataclass(frozen=True)
class Accepted:
    """A gateway accepted request `index`. request_id is its name in every log, pipeline the one that serves it.

    settings: every setting, by its name in bagel.request, with the defaults that the user left open.
    """

    index: int
    request_id: str
    seed: int
    pipeline: str
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PrefillDone:
    """The contexts of request `index` are computed: `tokens` tokens of K/V over all its distinct branches."""

    index: int
    tokens: int


@dataclass(frozen=True)
class DrawingStarted:
    """The picture of request `index` has its turn, after waiting for waited_s seconds."""

    index: int
    waited_s: float


@dataclass(frozen=True)
class TextDelta:
    """The next text of request `index`; think is True for the text before a picture."""

    index: int
    text: str
    think: bool


@dataclass(frozen=True)
class StepDone:
    """The device computes Euler step `step` (from 1) of `steps` for request `index`; all steps before it are done."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """Preview `number` (from 0) of the picture of request `index`: how it looked in Euler step `step`."""

    index: int
    number: int
    step: int
    image: Image


@dataclass(frozen=True)
class Result:
    """The result of request `index`.

    text: the answer, or the think text before a picture ("" if there is none); token_ids: its visible ids.
    timings: seconds per stage (context, text, denoise, decode). profile: seconds of the diffusion stages in order,
    by the device's clock, if they are profiled. A service also fills in usage (tokens and steps, named as in
    bagel.v1.Usage), request_id, the settings of `Accepted`, and file: the picture as a file of the format that was
    asked for, with its settings in its metadata (`bagel.images.read_settings`).
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
    file: bytes = field(default=b"", repr=False)

    @property
    def images(self) -> list[Image]:
        """The picture in a list, as vllm-omni's results have it; an answer has none."""
        return [] if self.image is None else [self.image]


Event = TextDelta | StepDone | Result
OnEvent = Callable[[Event], None]
ServiceEvent = Accepted | PrefillDone | DrawingStarted | Preview | Event
"""The events that a gateway reports."""
