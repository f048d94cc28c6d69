"""What the server and its runner process tell each other. Small and picklable; no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bagel.images import ResizedImage
from bagel.prompts import BranchName
from bagel.request import ImageSettings

SILENCE_S = 30.0
"""A runner that has told nothing for so long is taken for dead, once its model is loaded."""


# Commands: server to runner


@dataclass(frozen=True)
class PlacedContext:
    """A context whose K/V land later: its digest, its rows of K/V, the position after it."""

    digest: bytes
    length: int
    rope: int


@dataclass(frozen=True)
class Output:
    """How a picture is given out. image_format: of bagel.v1; quality: of a JPEG or WebP; previews: how many of it."""

    image_format: int = 0
    quality: int | None = None
    previews: int = 0


@dataclass(frozen=True)
class AddPicture:
    """Make room for a picture. posterior_shapes: drawn before its noise."""

    id: int
    settings: ImageSettings
    grid: tuple[int, int]
    seed: int
    posterior_shapes: tuple[tuple[int, ...], ...]
    contexts: Mapping[BranchName, PlacedContext]
    output: Output


@dataclass(frozen=True)
class LandedPage:
    """Rows of one layer of a context that are in shared memory: where they go, and their byte offsets there."""

    branch: BranchName
    layer: int
    row: int
    rows: int
    k_offset: int
    v_offset: int


@dataclass(frozen=True)
class Land:
    """Copy pages into a picture's slab."""

    id: int
    pages: tuple[LandedPage, ...]


@dataclass(frozen=True)
class Begin:
    """All K/V of a picture have been landed."""

    id: int


@dataclass(frozen=True)
class Serve:
    """A whole request, as a serialized bagel.v1.Request with every field set. images: of its prompt, read already."""

    id: int
    request: bytes
    output: Output
    images: tuple[ResizedImage, ...] = ()


@dataclass(frozen=True)
class Read:
    """Begin to read a request that is planned."""

    id: int


@dataclass(frozen=True)
class StepPlan:
    """One turn: an Euler step of these pictures (all of one bucket), and a unit of reading and writing text."""

    pictures: tuple[int, ...]
    read: bool


@dataclass(frozen=True)
class Remove:
    """Forget a request."""

    id: int


@dataclass(frozen=True)
class Stop:
    """End the process."""


Command = AddPicture | Land | Begin | Serve | Read | StepPlan | Remove | Stop


# Replies: runner to server


@dataclass(frozen=True)
class Ready:
    """The model is loaded: a serialized ModelInfo, and bytes of weights by component.

    kv_tokens: tokens of K/V that its device has room for.
    """

    info: bytes
    memory: Mapping[str, int]
    kv_tokens: int


@dataclass(frozen=True)
class Alive:
    """The process runs; told about every second."""


@dataclass(frozen=True)
class Hung:
    """A thread has made no progress for the step timeout. stack: where it is; loading: whether it loads the model."""

    loading: bool
    stack: str


@dataclass(frozen=True)
class Health:
    """Whether the runner can draw: not while the memory of its device is full with nothing under way."""

    healthy: bool


@dataclass(frozen=True)
class Planned:
    """A whole request has passed its checks."""

    id: int


@dataclass(frozen=True)
class PromptRead:
    """The context that a whole request's text goes on from is computed."""

    id: int


@dataclass(frozen=True)
class Prefilled:
    """The contexts of a whole request are computed: their distinct rows, and how many of them were computed for it."""

    id: int
    tokens: int
    computed: int


@dataclass(frozen=True)
class Begun:
    """A picture can take steps. bucket: latents a row is padded to; rows: its distinct contexts."""

    id: int
    steps: int
    bucket: int
    rows: int


@dataclass(frozen=True)
class Timed:
    """A step is done: what it was of (picture or text), how many requests it served, and its seconds."""

    kind: str
    requests: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """A plan was carried out: the steps taken so far of its pictures; reading: whether text is still to be done.

    timed: steps that were found to be done. On a GPU those of pictures are told one late, as the host runs ahead.
    """

    pictures: Mapping[int, int]
    reading: bool
    timed: tuple[Timed, ...] = ()


@dataclass(frozen=True)
class Text:
    """More text of a request."""

    id: int
    text: str
    think: bool


@dataclass(frozen=True)
class TextDone:
    """A request's text is complete. counts: fields of bagel.v1.Usage."""

    id: int
    text: str
    token_ids: tuple[int, ...]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A picture is decoded and encoded. profile: seconds of its stages in the runner, if they are wanted."""

    id: int
    data: bytes
    width: int
    height: int
    seconds: float
    profile: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Previewed:
    """A picture under way is decoded and encoded: its preview `index` (from 0), made in `step`."""

    id: int
    index: int
    step: int
    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Done:
    """A request without a picture is over."""

    id: int


@dataclass(frozen=True)
class Failed:
    """A request failed: a serialized google.rpc.Status."""

    id: int
    status: bytes


@dataclass(frozen=True)
class LoadFailed:
    """The model could not be loaded: a serialized google.rpc.Status. The process ends."""

    status: bytes


Reply = (
    Ready
    | Alive
    | Hung
    | Health
    | Planned
    | PromptRead
    | Prefilled
    | Begun
    | Stepped
    | Text
    | TextDone
    | Previewed
    | Drawn
    | Done
    | Failed
    | LoadFailed
)
