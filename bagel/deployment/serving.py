"""What a service makes of its configuration: TLS, bounds, and what reads images. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from bagel.deployment.shared_settings import Calling, Listening, ReadingImages
from bagel.errors import ConfigError
from bagel.images.pool import ImagePool
from bagel.rpc.limits import CONNECTIONS, Limits
from bagel.rpc.open_files import limit
from bagel.rpc.security import Security
from bagel.rpc.unread import Unread


def security(config: Listening) -> Security:
    """TLS of the service; ConfigError for files that do not fit together."""
    clients = config.tls_allow_clients
    if clients is None:
        clients = config.CALLERS if config.tls_ca is not None else ()
    return Security(config.tls_certificate, config.tls_key, config.tls_ca, clients=clients)


def limits(config: Listening) -> Limits:
    """Bounds of the gRPC port; ConfigError for more connections than there are descriptors for."""
    files = limit()
    most = files // 2
    if config.grpc_connections is not None and config.grpc_connections > most:
        raise ConfigError(
            f"--grpc-connections is {config.grpc_connections}; this process may open {files} files, and half of them "
            f"may be connections; give at most {most}, or raise ulimit -n"
        )
    return Limits(
        connections=config.grpc_connections or min(CONNECTIONS, most),
        streams=config.grpc_streams,
        watches=config.grpc_watches,
        message_s=config.grpc_message_timeout_s,
        handshake_s=config.grpc_handshake_timeout_s,
        age_s=config.grpc_connection_age_s,
    )


def unread(config: Listening) -> Unread:
    """A new account of the answers that wait for clients that read slowly."""
    return Unread(config.reader_timeout_s, config.max_unread_bytes)


def image_pool(config: ReadingImages, wait_s: float) -> ImagePool:
    """What the service reads images with; wait_s: the longest wait for a place."""
    return ImagePool(config.image_workers, config.image_timeout_s, wait_s)


def server_names(config: Calling, services: Iterable[str], *, tls: bool) -> dict[str, str]:
    """The name that the certificate of each service must have, where it is not its role.

    Raises ConfigError for a service that is not called, or is called in plaintext.
    """
    names = dict(each.split("=", 1) for each in config.tls_server_names)
    known = set(services)
    for service in names:
        if service not in known:
            called = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"--tls-server-name names {service!r}, which is not called; there is {called}")
    if names and not tls:
        raise ConfigError("--tls-server-name needs TLS to the services; give --tls-ca")
    return names
