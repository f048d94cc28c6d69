"""The way from vLLM's workers to the store: its shared memory, and notices of what has been written there.

A worker in the engine's own process finds the store's memory and the ear for its notices here by name; one in another
process opens the memory through the engine's file descriptor and sends its notices over a local socket.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bagel.kv.arena import Arena
from bagel.kv.pages import KvLayout

LONGEST_NOTICE = 1 << 16
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
    _folder: Path | None = None
    _socket: socket.socket | None = None

    def open(self, *, other_processes: bool) -> dict[str, Any]:
        """Make it known to workers; what they need to find it (`Outlet.find`)."""
        _HERE[self.name] = self
        address = self._listen() if other_processes else ""
        return {
            "name": self.name,
            "layout": asdict(self.layout),
            "memory": f"/proc/{os.getpid()}/fd/{self.arena.fd}",
            "nbytes": self.arena.nbytes,
            "address": address,
        }

    def close(self) -> None:
        """Hear nothing more."""
        _HERE.pop(self.name, None)
        if self._socket is not None:
            self._socket.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self) -> str:
        self._folder = Path(tempfile.mkdtemp(prefix="bagel-kv-"))
        address = str(self._folder / "notices")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        threading.Thread(target=self._receive, args=(self._socket,), name="kv-notices", daemon=True).start()
        return address

    def _receive(self, ear: socket.socket) -> None:
        while True:
            try:
                told = ear.recv(LONGEST_NOTICE)
            except OSError:  # closed
                return
            self.hear(Notice(**json.loads(told)))


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
        mouth = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        mouth.connect(given["address"])
        return cls(arena, KvLayout(**given["layout"]), lambda notice: _send(mouth, notice))


def _send(mouth: socket.socket, notice: Notice) -> None:
    mouth.send(json.dumps(asdict(notice)).encode())
