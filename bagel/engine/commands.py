"""Commands to an engine: small, frozen and picklable, so that one stream of them drives every rank. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bagel.images.output import OutputFormat
from bagel.prompts import BranchName
from bagel.request import ImageSettings, Request


@dataclass(frozen=True)
class PlacedContext:
    """A context whose K/V arrive later: its digest, its rows of K/V, the position after it."""

    # Contexts with equal digests share their rows of the slab.
    digest: bytes
    length: int
    rope: int


@dataclass(frozen=True)
class AddPicture:
    """Make room for a picture whose K/V arrive later. posterior_shapes: drawn before its noise.

    output: None gives the image itself, for a caller in the same process.
    """

    id: int
    settings: ImageSettings
    grid: tuple[int, int]
    seed: int
    # The reference draws these from the same generator first, so the engine draws and drops them.
    posterior_shapes: tuple[tuple[int, ...], ...]
    contexts: Mapping[BranchName, PlacedContext]
    output: OutputFormat | None


@dataclass(frozen=True)
class LandedPage:
    """Rows of one layer of a context that are in shared memory: where they go, and their byte offsets there."""

    branch: BranchName
    layer: int
    row: int
    rows: int
    # Offsets, as K/V do not pass the pipe: each rank reads them in shared memory.
    k_offset: int
    v_offset: int


@dataclass(frozen=True)
class LoadPages:
    """Copy pages into a picture's rows of the slab."""

    id: int
    pages: tuple[LandedPage, ...]


@dataclass(frozen=True)
class Begin:
    """All K/V of a picture have arrived."""

    id: int


@dataclass(frozen=True)
class Advance:
    """Compute a picture's first step as far as its K/V are in the slab; nothing if it has begun or is over."""

    id: int


@dataclass(frozen=True)
class AddRequest:
    """Serve a whole request: plan it, then read its prompt, write its text and draw its picture.

    output: as of AddPicture; check_only: stop after the plan.
    """

    id: int
    request: Request
    output: OutputFormat | None = None
    check_only: bool = False


@dataclass(frozen=True)
class StepPlan:
    """One turn: an Euler step of these pictures (all of one bucket), and a unit of reading and writing text.

    begin: whole requests that reading begins with from this turn on. Ranks plan them in threads of their own, so a rank
    waits here for its plan: all begin a request in the same turn.
    """

    pictures: tuple[int, ...]
    read: bool
    begin: tuple[int, ...] = ()


@dataclass(frozen=True)
class Remove:
    """Forget a request; nothing if it is over."""

    id: int


Command = AddPicture | LoadPages | Begin | Advance | AddRequest | StepPlan | Remove
