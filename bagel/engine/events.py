"""What an engine says of its requests, each event given to one `emit`. Small, frozen and picklable. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL.Image import Image

from bagel.errors import BagelError


@dataclass(frozen=True)
class Planned:
    """A whole request has passed its checks."""

    id: int


@dataclass(frozen=True)
class PromptRead:
    """The context that a whole request's text continues is computed."""

    id: int


@dataclass(frozen=True)
class Prefilled:
    """The contexts of a whole request are computed: their distinct rows of K/V, and how many no cache had."""

    id: int
    tokens: int
    computed: int


@dataclass(frozen=True)
class Text:
    """More text of a request. tokens: those of the whole text so far."""

    id: int
    text: str
    think: bool
    tokens: int


@dataclass(frozen=True)
class TextDone:
    """A request's text is complete. counts: fields of bagel.v1.Usage."""

    id: int
    text: str
    token_ids: tuple[int, ...]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayersLanded:
    """K/V of a picture's first layers are in the slab, with others to come: `Advance` computes with them."""

    id: int


@dataclass(frozen=True)
class Begun:
    """A picture can take steps. bucket: latents a row is padded to; rows: its distinct contexts.

    layers_ahead: of its first step, computed while its K/V came; first_step_at: when that began, by time.monotonic.
    """

    id: int
    steps: int
    bucket: int
    rows: int
    layers_ahead: int = 0
    first_step_at: float | None = None


@dataclass(frozen=True)
class StepTaken:
    """Euler step `step` (from 1) of a picture is launched; all before it are done."""

    id: int
    step: int


@dataclass(frozen=True)
class StepTimed:
    """A step is done: its kind (picture or text), how many requests it served, and its seconds."""

    kind: str
    requests: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """A plan was carried out. reading: whether text is still to be done.

    timed: steps that were found to be done. On a GPU those of pictures come one late, as the host runs ahead.
    """

    reading: bool
    timed: tuple[StepTimed, ...] = ()


@dataclass(frozen=True)
class Previewed:
    """A preview of a picture under way, in the format of its output: number `index` (from 0), made in `step`."""

    id: int
    index: int
    step: int
    picture: bytes | Image
    width: int
    height: int


@dataclass(frozen=True)
class Drawn:
    """A finished picture, in the format of its output. profile: seconds of its stages on the device, if asked for."""

    id: int
    picture: bytes | Image
    width: int
    height: int
    seconds: float
    profile: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A request without a picture is over."""

    id: int


@dataclass(frozen=True)
class Failed:
    """A request ended with an error."""

    id: int
    error: BagelError


@dataclass(frozen=True)
class Health:
    """Whether the engine can draw: not while its device's memory is full with nothing under way."""

    healthy: bool


@dataclass(frozen=True)
class Broken:
    """A rank of several can go on no longer: an error that the others do not have. cause: what it was, in one line."""

    cause: str


RequestEvent = (
    Planned | PromptRead | Prefilled | Text | TextDone | Begun | StepTaken | Previewed | Drawn | Done | Failed
)
Event = RequestEvent | LayersLanded | Stepped | Health | Broken
