"""Pictures that wait for room for their K/V on the device, in the order in which they came."""

from __future__ import annotations

from dataclasses import dataclass, field

from bagel.checkpoint.limits import check_kv_room
from bagel.engine.commands import LandedPage
from bagel.engine.picture import Picture
from bagel.engine.slab import SharedSlab
from bagel.images.output import OutputFormat


@dataclass
class Waiting:
    """A picture. begun: all its K/V are there; pages: those that have landed, in shared memory, meanwhile."""

    picture: Picture
    output: OutputFormat | None
    padded: int
    begun: bool
    pages: list[LandedPage] = field(default_factory=list)


class WaitingLine:
    """The picture that came first is placed first, so that a large one is not passed by small ones for ever."""

    def __init__(self, space: SharedSlab) -> None:
        self._space = space
        self._waiting: dict[int, Waiting] = {}

    def join(self, id_: int, waiting: Waiting) -> None:
        """Wait for room. Raises InvalidRequest for a picture that will never have it."""
        check_kv_room(self._space.needed(waiting.picture.kv_tokens(waiting.padded)), self._space.size)
        self._waiting[id_] = waiting

    def get(self, id_: int) -> Waiting | None:
        """A picture that waits."""
        return self._waiting.get(id_)

    def leave(self, id_: int) -> None:
        """Take a picture out of the line, if it waits there."""
        if self._waiting.pop(id_, None) is not None:
            self._space.withdraw(("picture", id_))

    def next(self) -> tuple[int, Waiting] | None:
        """Take out the first picture, if there is room for it now."""
        # Only the first is tried: a later one that fits must not pass it.
        for id_, waiting in self._waiting.items():
            if self._space.has_room(("picture", id_), waiting.picture.kv_tokens(waiting.padded)):
                del self._waiting[id_]
                return id_, waiting
            break
        return None
