"""What happens while requests are served, as an engine reports it. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from PIL.Image import Image


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
class Result:
    """What request `index` came to.

    text: the reply, or the think text before a picture ("" if there is none); token_ids: its visible ids.
    timings: seconds by stage (context, text, denoise, decode).
    """

    index: int
    image: Image | None
    text: str
    token_ids: tuple[int, ...]
    seed: int
    timings: Mapping[str, float] = field(default_factory=dict)


Event = TextDelta | StepDone | Result
OnEvent = Callable[[Event], None]
