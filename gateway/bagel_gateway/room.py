"""How many bytes of requests a gateway holds at once, whichever front they come through."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from bagel.errors import Busy

SMALL_BYTES = 2**18
"""Requests up to this size are not counted, so that texts always find room; the places of a gateway bound these."""


class Room:
    """Room for so many bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = self.free = nbytes

    def hold(self) -> Held:
        """What one request takes of it, until it is closed."""
        return Held(self)


class Held:
    """Bytes of one request, given back at the end of a `with`."""

    def __init__(self, room: Room) -> None:
        self._room, self.nbytes = room, 0

    def resize(self, nbytes: int) -> None:
        """Hold so many bytes; Busy if there is no room for them."""
        more = _counted(nbytes) - _counted(self.nbytes)
        if more > self._room.free:
            raise Busy(
                f"the gateway holds as many bytes of requests as it has memory for (--max-bytes-in-flight, "
                f"{self._room.nbytes}); try again later"
            )
        self._room.free -= more
        self.nbytes = nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.resize(0)


def _counted(nbytes: int) -> int:
    return nbytes if nbytes > SMALL_BYTES else 0
