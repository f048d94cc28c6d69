"""A rank in a Ray actor: its program runs in a thread, and the server gives orders and takes reports by calls.

No torch here; the rank's program imports it.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import cast

import bagel
from bagel.engine.progress import Heartbeat
from bagel_dit.workers import Place, RankSettings
from bagel_dit.workers.messages import Order, Report
from bagel_dit.workers.pipe import Pipe
from bagel_dit.workers.watch import Watch

SIOCGIFADDR = 0x8915
"""Of Linux's ioctl: the IPv4 address of a network interface."""
CALLS = 4
"""Calls that an actor carries out at once: orders, reports, and questions beside them."""


@dataclass(frozen=True)
class Said:
    """Lines that the rank wrote to standard error, which the server writes to its own: a rank has the server's log."""

    lines: str


@dataclass(frozen=True)
class Ended:
    """The rank's program has ended. cause: why, or empty if it was asked to or has told why."""

    cause: str = ""


@dataclass(frozen=True)
class About:
    """What an actor tells before it starts: its process id, and the release of this package on its node."""

    pid: int
    release: str


class RankActor:
    """One rank of a group."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._reports: SimpleQueue[Report | Said | Ended] = SimpleQueue()

    def about(self) -> About:
        """What runs here; raises nothing, so that whoever gets no answer knows the rank is gone."""
        return About(os.getpid(), bagel.__version__)

    def free_port(self, address: str) -> int:
        """A TCP port of this node that is free now."""
        with socket.create_server((address, 0)) as server:
            return int(server.getsockname()[1])

    def start(self, settings: RankSettings, place: Place, address: str) -> None:
        """Let the rank's program run. address: of this node, by which other nodes reach it."""
        if (interface := _interface(address)) is not None:
            # Otherwise gloo looks up the host's name, which other nodes may not reach.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        sys.stderr = _Lines(self._reports)
        threading.Thread(target=self._run, args=(settings, place), name="rank", daemon=True).start()

    def order(self, orders: list[Order]) -> None:
        """Take orders, which come in their order as each call waits for the one before."""
        for order in orders:
            self._orders.put(order)

    def reports(self) -> list[Report | Said | Ended]:
        """What there is to tell since the last call; waits until there is something."""
        told = [self._reports.get()]
        try:
            while True:
                told.append(self._reports.get_nowait())
        except Empty:
            return told

    def _run(self, settings: RankSettings, place: Place) -> None:
        cause = ""
        try:
            # To the rank's program these queues are its pipe.
            pipe, heartbeat = cast(Pipe, _Queues(self._orders, self._reports)), Heartbeat()
            watch = Watch(heartbeat, settings.config.step_timeout_s, pipe.send, place.rendezvous)
            watch.start()  # the import may hang too
            from bagel_dit.workers.rank import main

            main(pipe, heartbeat, watch, settings, place)
        except BaseException as error:
            self._reports.put(Said(traceback.format_exc()))
            cause = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self._reports.put(Ended(cause))


class _Queues:
    """A rank's end of the server's calls, with the methods of `Pipe`. A server that is gone takes the actor along."""

    def __init__(self, orders: SimpleQueue[Order], reports: SimpleQueue[Report | Said | Ended]) -> None:
        self._orders, self._reports = orders, reports

    def next(self, timeout_s: float | None) -> Order | None:
        try:
            return self._orders.get(timeout=timeout_s)
        except Empty:
            return None

    def send(self, report: Report) -> None:
        self._reports.put(report)


class _Lines(io.TextIOBase):
    """Standard error of a rank: whole lines become reports."""

    def __init__(self, reports: SimpleQueue[Report | Said | Ended]) -> None:
        self._reports, self._begun, self._writing = reports, "", threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Keep text until its line ends."""
        with self._writing:
            whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._reports.put(Said(whole + newline))
        return len(text)


def _interface(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where it is not found."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without such an address
                found = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
