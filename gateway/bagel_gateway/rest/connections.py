"""Connections of the HTTP front: bounded in number, and none is held by a client that asks for nothing."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import h11

from bagel.deployment.http_front import HttpFront
from bagel.errors import ConfigError
from bagel.rpc.open_files import limit
from bagel.telemetry.logs import Log
from bagel_gateway.rest.certificates import Certified

MAX_CONNECTIONS = 512
RESERVE = 32
"""Connections beyond the most that are worked for: of probes, and of those that have asked for nothing yet."""
KEPT = 64
"""Descriptors that are left to services and files, beside gRPC's, half of all (`bagel.rpc.service.limits`)."""
BACKLOG = 128
"""Length of the kernel's queue of connections that are not accepted yet."""
STUCK_S = 30.0
"""Seconds in which a client may read nothing of what is left for it when its connection ends."""
_AT_ONCE = 64
_STARVED_S = 0.2
_WARN_EVERY_S = 60.0
_FREE_CHUNKS, _CHUNK = 1000, 64
"""Chunks that a body may come in, and the mean size of those beyond: each costs some ten microseconds."""

log = Log("bagel_gateway.rest")


def connections_allowed(asked: int | None) -> int:
    """How many connections there may be; ConfigError if so many cannot be open beside everything else."""
    room = limit() // 2 - KEPT - RESERVE
    if asked is None:
        return max(1, min(MAX_CONNECTIONS, room))
    if asked > room:
        raise ConfigError(
            f"--max-connections is {asked}; this process may open {limit()} files, of which {max(room, 0)} can be "
            "HTTP connections; lower it, or raise the limit (ulimit -n)"
        )
    return asked


class Connections:
    """All that are open, at most `most`. Where there is no room for one more, the one that has waited longest for a
    request of its client goes: a client that asks at once is not kept out by those that never do.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # in order of their wait
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self.on_room: Callable[[], None] = lambda: None
        """Called when a connection has ended."""

    def make_room(self) -> bool:
        """Whether one more may be accepted, once the one that waited longest has gone if it must."""
        return len(self._open) + len(self._handshakes) < self._most or self.drop_one()

    def drop_one(self) -> bool:
        """End the one that has waited longest for its client; False if none waits."""
        if self._waiting:
            # Counted out now, since the event loop reports its end only later.
            self.ended(oldest := next(iter(self._waiting)))
            oldest.transport.abort()
            return True
        if self._handshakes:
            task = next(iter(self._handshakes))
            del self._handshakes[task]
            task.cancel()
            return True
        return False

    def begin(self, task: asyncio.Task[None]) -> None:
        """Count one that is being set up."""
        self._handshakes[task] = None
        task.add_done_callback(self._begun)

    def _begun(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    def waits(self, connection: Connection) -> None:
        """It waits for a request, from now on."""
        self._open.add(connection)
        # Taken out and put in again, which moves it to the end of the order.
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def works(self, connection: Connection) -> None:
        """It has a request."""
        self._waiting.pop(connection, None)

    def ended(self, connection: Connection) -> None:
        """It has ended."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)
        self.on_room()


class Connection(Certified):
    """uvicorn's, with a time limit for heads of requests and for the reading of last answers."""

    def __init__(self, connections: Connections, guards: HttpFront, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.conn = _FewChunks(h11.SERVER)
        self._all, self._header_timeout_s = connections, guards.header_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._stuck_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._all.waits(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application that its client has gone."""
        super().connection_lost(exc)
        self._all.ended(self)
        self._stop_timers()
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take bytes, which may complete a request's head, or begin one."""
        super().data_received(data)
        if self._asked:
            self._stop_timers()
            self._all.works(self)
        elif self._head_timer is None and not self.transport.is_closing():
            self._expect_head()

    def on_response_complete(self) -> None:
        """Wait for the next request, which may be there already."""
        super().on_response_complete()
        if not self._asked:
            self._all.waits(self)
        if self.transport.is_closing():
            self._end_if_stuck(-1)
        # Its client has begun to send the next request already.
        elif not self._asked and self.conn.trailing_data[0]:
            self._expect_head()

    def timeout_keep_alive_handler(self) -> None:
        """End what has been idle too long."""
        super().timeout_keep_alive_handler()
        self._end_if_stuck(-1)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, unless an answer is being sent already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
            self._end_if_stuck(-1)
        else:
            self.transport.abort()

    @property
    def _asked(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._stop_timers()
        self._head_timer = self.loop.call_later(self._header_timeout_s, self.transport.abort)

    def _stop_timers(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_if_stuck(self, before: int) -> None:
        """End it once its client has read nothing for a while of what is left to send."""
        # The first call says -1, which no size equals, so it only starts the timer.
        left = self.transport.get_write_buffer_size()
        if left == before:
            self.transport.abort()
        else:
            self._stuck_timer = self.loop.call_later(STUCK_S, self._end_if_stuck, left)


class _FewChunks(h11.Connection):
    """Refuses a body in very many very small chunks."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        """As h11's."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._chunks, self._bytes = self._chunks + 1, self._bytes + len(event.data)
            if self._chunks > _FREE_CHUNKS + self._bytes // _CHUNK:
                raise h11.RemoteProtocolError("the body comes in too many too small chunks")
        return event


class Acceptor:
    """Accepts connections of one socket. In place of asyncio's, which takes any number of them, and where no descriptor
    is left tries and logs the same for each that waits.
    """

    def __init__(
        self,
        listening: socket.socket,
        make: Callable[[], Connection],
        connections: Connections,
        tls: ssl.SSLContext | None,
        handshake_s: float,
    ) -> None:
        self._socket, self._make, self._connections, self._tls = listening, make, connections, tls
        self._handshake_s = handshake_s if tls is not None else None
        self._loop = asyncio.get_running_loop()
        self._warned_at = -_WARN_EVERY_S
        self._accepting = self._closed = False
        connections.on_room = self.start
        self.start()

    def start(self) -> None:
        """Accept, from now on or again."""
        if not self._closed and not self._accepting:
            self._accepting = True
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._pause()
        self._closed = True

    async def wait_closed(self) -> None:
        """Return at once: what closes the connections waits for them."""

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._socket.fileno())

    def _accept(self) -> None:
        # Bounded, so that many new connections do not keep the event loop from the old ones.
        for _ in range(_AT_ONCE):
            if not self._connections.make_room():
                self._pause()  # until one ends
                return
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._starved(error)
                return
            accepted.setblocking(False)
            self._connections.begin(self._loop.create_task(self._set_up(accepted)))

    async def _set_up(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make, accepted, ssl=self._tls, ssl_handshake_timeout=self._handshake_s
            )
        except OSError as error:  # ssl.SSLError is one; the transport has closed the socket
            log.debug("a connection could not be set up", error=str(error))

    def _starved(self, error: OSError) -> None:
        """No descriptor is left: one that waits gives way, and the next are accepted a little later."""
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning("connections wait: none can be accepted", error=str(error), remedy="lower --max-connections")
        self._pause()
        self._loop.call_later(_STARVED_S, self.start)
        self._connections.drop_one()
