"""The network between two processes: a TCP proxy that delays, cuts, truncates, damages and stalls what passes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.campaign.frames import Framed

CHUNK = 1 << 16
DRIBBLED = 400
"""Bytes that come in crumbs."""
DAMAGES = ("truncate", "garbage", "repeat", "flip", "frame-head", "frame-lost")
"""Faults after which one side may not know any more what the bytes are."""
CONNECT_S = 5.0


@dataclass(eq=False)
class NetFault:
    """One thing that happens to the bytes of a link. down: those that go to the client.

    skip: bytes of that direction that pass before it; seconds: of those kinds that take time.
    """

    kind: str
    down: bool
    skip: int
    seconds: float
    seed: int
    fired: bool = False


class Connection:
    """One connection through a link, both ways."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, framed: bool) -> None:
        self.writers = (client, server)
        self.frames = {down: Framed(preface=not down) for down in (True, False)} if framed else None
        self.mute = {True: False, False: False}
        self.damaged = False

    def abort(self) -> None:
        """Reset both ends."""
        for writer in self.writers:
            writer.transport.abort()


@dataclass(eq=False)
class Link:
    """A port that leads to another one. target can change: services that start again have new ports.

    framed: it carries gRPC in plaintext, so that faults can be told which frames to hit.
    """

    name: str
    target: str = ""
    framed: bool = False
    port: int = 0
    armed: list[NetFault] = field(default_factory=list)
    refusing: bool = False
    passed: int = 0
    _connections: set[Connection] = field(default_factory=set)
    _pipes: set[asyncio.Task[None]] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self) -> None:
        """Listen on a free port of the loopback."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no more, and break what is open."""
        self._server.close()
        self.break_all()
        for pipe in list(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def arm(self, fault: NetFault) -> None:
        """Have it happen to what passes from now on."""
        self.armed.append(fault)

    def heal(self) -> None:
        """Let everything through again. A connection that was made deaf or was damaged is broken: gRPC takes some 20 s
        to find that its peer reads on in the midst of a frame."""
        self.armed.clear()
        self.refusing = False
        for connection in list(self._connections):
            if connection.damaged or any(connection.mute.values()):
                connection.abort()

    def break_all(self) -> None:
        """Reset all connections."""
        for connection in list(self._connections):
            connection.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        host, _, port = self.target.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_S):
                theirs, out = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError, ValueError):
            writer.transport.abort()
            return
        connection = Connection(writer, out, self.framed)
        self._connections.add(connection)
        pipes = {
            asyncio.create_task(self._pipe(connection, reader, out, down=False)),
            asyncio.create_task(self._pipe(connection, theirs, writer, down=True)),
        }
        self._pipes |= pipes
        try:
            await asyncio.wait(pipes)
        finally:
            for pipe in pipes:
                pipe.cancel()
            self._pipes -= pipes
            self._connections.discard(connection)
            connection.abort()

    async def _pipe(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                self.passed += len(data)
                self._news.set()
                self._news.clear()
                if connection.frames is not None:
                    data = connection.frames[down].take(data, self._frame_faults(connection, down))
                for fault in self._due(down, len(data)):
                    data = await self._happen(fault, data, connection, writer, down)
                if data and not connection.mute[down]:
                    writer.write(data)
                    await writer.drain()
            writer.write_eof()
        except OSError:  # one end was reset, which the other one is told
            connection.abort()

    def _frame_faults(self, connection: Connection, down: bool) -> list[NetFault]:
        """Those that may hit a frame of this direction; pages come down alone."""
        due = []
        for fault in self.armed:
            of_pages = fault.kind.startswith("page-")
            if not fault.fired and ((of_pages and down) or (fault.kind.startswith("frame-") and fault.down == down)):
                due.append(fault)
        connection.damaged |= any(fault.kind.startswith("frame-") for fault in due)
        return due

    def _due(self, down: bool, nbytes: int) -> list[NetFault]:
        """The faults whose place is in these bytes."""
        due = []
        for fault in list(self.armed):
            if fault.down != down or fault.kind.startswith(("page-", "frame-")):
                continue
            if fault.skip < nbytes:
                due.append(fault)
                self.armed.remove(fault)
            else:
                fault.skip -= nbytes
        return due

    async def _happen(
        self, fault: NetFault, data: bytes, connection: Connection, writer: asyncio.StreamWriter, down: bool
    ) -> bytes:
        """What is left to be sent of these bytes."""
        at = min(fault.skip, max(0, len(data) - 1))
        fault.fired = True
        connection.damaged |= fault.kind in DAMAGES
        match fault.kind:
            case "delay" | "stall":
                await asyncio.sleep(fault.seconds)
            case "reorder":  # until something else has passed, of another connection perhaps
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), fault.seconds)
            case "cut":
                connection.abort()
                return b""
            case "truncate":
                writer.write(data[:at])
                with suppress(OSError):
                    await writer.drain()
                writer.close()
                connection.writers[0 if writer is connection.writers[1] else 1].close()
                return b""
            case "dribble":
                first, rest = data[:DRIBBLED], data[DRIBBLED:]
                for begin in range(0, len(first), 7):
                    if writer.transport.is_closing():
                        return b""
                    writer.write(first[begin : begin + 7])
                    await asyncio.sleep(0)
                return rest
            case "blackhole":
                connection.mute[down] = True
                return b""
            case "flip":
                damaged = bytearray(data)
                damaged[at] ^= 1 << random.Random(fault.seed).randrange(8)
                return bytes(damaged)
            case "garbage":
                return data[:at] + random.Random(fault.seed).randbytes(24) + data[at:]
            case "repeat":
                return data + data[at:]
            case _:
                raise AssertionError(fault.kind)
        return data


Makes = Callable[[str], Link]
