"""The way from vLLM's workers to the store: its shared memory, and notices of what has been written there.

A worker in the engine's own process finds the store's memory and the ear for its notices here by name; one in another
process opens the memory, and a pipe for its notices, through the engine's file descriptors. Neither has a path of its
own: whoever is killed, nothing stays behind.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from select import PIPE_BUF
from typing import Any

from bagel.kv.arena import Arena
from bagel.kv.pages import KvLayout

MOST_WORDS = PIPE_BUF // 16
"""Characters of a failure that are told: a notice, however encoded, must be one write of a pipe."""
_HERE: dict[str, Sink] = {}


@dataclass(frozen=True)
class Notice:
    """What a worker tells: a layer of a segment is written, a request's export failed, or a request is over.

    request: its id; digest: hexadecimal; rank: the tensor-parallel rank that tells.
    """

    request: str
    rank: int = 0
    digest: str = ""
    layer: int = -1
    failure: str = ""
    over: bool = False


@dataclass
class Sink:
    """The engine's end. `hear` is called with each notice, from a thread of its own or the worker's."""

    arena: Arena
    layout: KvLayout
    hear: Callable[[Notice], None]
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    _mouth: int = -1

    def open(self, *, other_processes: bool) -> dict[str, Any]:
        """Make it known to workers; what they need to find it (`Outlet.find`)."""
        _HERE[self.name] = self
        return {
            "name": self.name,
            "layout": asdict(self.layout),
            "memory": _path(self.arena.fd),
            "nbytes": self.arena.nbytes,
            "notices": self._listen() if other_processes else "",
        }

    def close(self) -> None:
        """Hear nothing more."""
        _HERE.pop(self.name, None)
        if self._mouth >= 0:
            os.write(self._mouth, b"\n")
            os.close(self._mouth)
            self._mouth = -1

    def _listen(self) -> str:
        ear, self._mouth = os.pipe()
        threading.Thread(target=self._receive, args=(ear,), name="kv-notices", daemon=True).start()
        return _path(self._mouth)

    def _receive(self, ear: int) -> None:
        with os.fdopen(ear, "rb") as lines:
            for line in lines:
                if not line.strip():  # closed
                    return
                self.hear(Notice(**json.loads(line)))


class Outlet:
    """A worker's end: where it writes, and how it tells."""

    def __init__(self, arena: Arena, layout: KvLayout, tell: Callable[[Notice], None]) -> None:
        self.arena, self.layout, self.tell = arena, layout, tell

    @classmethod
    def find(cls, given: dict[str, Any]) -> Outlet:
        """From what `Sink.open` gave."""
        if (sink := _HERE.get(given["name"])) is not None:
            return cls(sink.arena, sink.layout, sink.hear)
        arena = Arena.attach(os.open(given["memory"], os.O_RDWR), given["nbytes"])
        mouth = os.open(given["notices"], os.O_WRONLY)
        return cls(arena, KvLayout(**given["layout"]), lambda notice: _send(mouth, notice))


def _path(fd: int) -> str:
    """Where other processes of this user open a file of this one."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _send(mouth: int, notice: Notice) -> None:
    short = replace(notice, failure=notice.failure[:MOST_WORDS])
    os.write(mouth, json.dumps(asdict(short)).encode() + b"\n")
