"""Connects vLLM's workers to the store: shared memory for the K/V, and notices about what has been written.

A worker in the engine's process finds the sink here by its name. A worker in another process opens the store's memory,
and a pipe for its notices, through the engine's file descriptors under /proc. No file has a path of its own, so a
killed process leaves nothing behind.
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

MOST_CHARACTERS = PIPE_BUF // 16
"""Characters of a failure's text. A notice must fit into one atomic write to a pipe, however JSON escapes it."""
_HERE: dict[str, Sink] = {}  # the sinks of this process, by name


@dataclass(frozen=True)
class Notice:
    """A worker's notice: a layer of a segment is written, a request's export failed, or a request is over.

    request: its id; digest: hexadecimal; rank: the sender's tensor-parallel rank.
    """

    request: str
    rank: int = 0
    digest: str = ""
    layer: int = -1
    failure: str = ""
    over: bool = False


@dataclass
class Sink:
    """The engine's end. It calls on_notice with each notice, in a thread of its own or in the worker's."""

    arena: Arena
    layout: KvLayout
    on_notice: Callable[[Notice], None]
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    _pipe: int = -1

    def open(self, *, other_processes: bool) -> dict[str, Any]:
        """Register the sink; returns the fields with which a worker finds it (`Outlet.find`)."""
        _HERE[self.name] = self
        return {
            "name": self.name,
            "layout": asdict(self.layout),
            "memory": self.arena.name,
            "nbytes": self.arena.nbytes,
            "notices": self._listen() if other_processes else "",
        }

    def close(self) -> None:
        """Stop receiving notices."""
        _HERE.pop(self.name, None)
        if self._pipe >= 0:
            os.write(self._pipe, b"\n")  # ends the thread, even if a worker still holds its end of the pipe open
            os.close(self._pipe)
            self._pipe = -1

    def _listen(self) -> str:
        reading_end, self._pipe = os.pipe()
        threading.Thread(target=self._receive, args=(reading_end,), name="kv-notices", daemon=True).start()
        return f"/proc/{os.getpid()}/fd/{self._pipe}"  # by which other processes of this user can open it

    def _receive(self, reading_end: int) -> None:
        with os.fdopen(reading_end, "rb") as lines:
            for line in lines:
                if not line.strip():  # written by `close`
                    return
                self.on_notice(Notice(**json.loads(line)))


class Outlet:
    """A worker's end: the memory that it writes to, and the function that sends its notices."""

    def __init__(self, arena: Arena, layout: KvLayout, send: Callable[[Notice], None]) -> None:
        self.arena, self.layout, self.send = arena, layout, send

    @classmethod
    def find(cls, given: dict[str, Any]) -> Outlet:
        """Find the sink by the fields that `Sink.open` returned."""
        if (sink := _HERE.get(given["name"])) is not None:
            return cls(sink.arena, sink.layout, sink.on_notice)
        arena = Arena.attach(given["memory"], given["nbytes"])
        pipe = os.open(given["notices"], os.O_WRONLY)
        return cls(arena, KvLayout(**given["layout"]), lambda notice: _send(pipe, notice))


def _send(pipe: int, notice: Notice) -> None:
    short = replace(notice, failure=notice.failure[:MOST_CHARACTERS])
    os.write(pipe, json.dumps(asdict(short)).encode() + b"\n")
