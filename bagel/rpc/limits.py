"""How much a service takes of its callers, and how long it waits for them. Standard library alone: --help reads it."""

from __future__ import annotations

from dataclasses import dataclass

CONNECTIONS = 4096
"""Silent ones cost some 20 KiB each, for --grpc-handshake-timeout at most."""
MAX_MESSAGE_BYTES = 64 * 2**20
"""A prompt's images and a picture fit; K/V pages are far smaller."""
DRAIN_S = 30.0
READER_TIMEOUT_S = 60.0
"""Longest time in which a reader may take nothing: longer than a phone is out of reach in a tunnel."""
MAX_UNREAD_BYTES = 128 * 2**20
MAX_UNREAD_CALL_BYTES = 64 * 2**20
"""Ten large pictures with their previews; a message alone may have as much."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a gRPC server. None of them ends a call whose request has been read.

    connections: at once, in all; streams: calls at once on one connection. watches: streams that may idle (health's
    Watch and reflection), of which one host gets a quarter. message_s: until a call's request has come in, and between
    two requests of reflection; handshake_s: until TLS and HTTP/2 have been agreed on; age_s: of a connection, then its
    caller makes another for new calls.
    """

    connections: int = CONNECTIONS
    streams: int = 1024
    watches: int = 256
    message_s: float = 120.0
    handshake_s: float = 10.0
    age_s: float = 600.0

    def options(self) -> tuple[tuple[str, int], ...]:
        """Those that gRPC itself keeps."""
        return (
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.server_handshake_timeout_ms", round(1000 * self.handshake_s)),
            ("grpc.http2.settings_timeout", round(1000 * self.handshake_s)),
            ("grpc.max_connection_age_ms", round(1000 * self.age_s)),
        )
