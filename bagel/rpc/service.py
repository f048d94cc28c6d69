"""What the three services' processes have in common: flags, start, end. No torch here."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bagel.arguments import Parser, for_command_line
from bagel.errors import BagelError, ConfigError
from bagel.images.pool import TIMEOUT_S, WORKERS, ImagePool
from bagel.rpc.limits import CONNECTIONS, DRAIN_S, MAX_UNREAD_BYTES, READER_TIMEOUT_S
from bagel.rpc.open_files import limit, raise_limit
from bagel.rpc.transport import Host, Limits, Security
from bagel.rpc.unread import Unread
from bagel.telemetry.logs import Log, set_up_logs
from bagel.telemetry.metrics import set_up_metrics
from bagel.telemetry.otlp import shut_down
from bagel.telemetry.tracing import set_up_tracing

DEFAULT_KV_BYTES = 2 * 2**30
BATCH_TIMEOUT_S = 5.0
LEASE_S = 10.0
"""Seconds that K/V are kept for a holder who is not heard of."""
LAST_WORDS_S = 1.0
"""For the calls of a service that has failed: they were told, and the telling may take a moment."""

log = Log("bagel.service")

C = TypeVar("C", bound=Any)


def parser(module: str, description: str, listen: str, clients: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with the flags that every service has. clients: whose certificates it takes calls of by default."""
    flags = Parser(prog=f"python -m {module}", description=description)
    flags.add_argument(
        "--listen", default=listen, metavar="HOST:PORT", help=f"port 0: any free one (default: {listen})"
    )
    flags.add_argument("--drain-timeout", type=float, default=DRAIN_S, metavar="S", help="for requests under way")
    flags.add_argument(
        "--reader-timeout",
        type=float,
        default=READER_TIMEOUT_S,
        metavar="S",
        help=f"of a client that takes nothing of its answer; then its call ends (default: {READER_TIMEOUT_S:g})",
    )
    flags.add_argument(
        "--max-unread-bytes",
        type=int,
        default=MAX_UNREAD_BYTES,
        metavar="N",
        help=f"of all answers that wait for their clients (default: {MAX_UNREAD_BYTES})",
    )
    flags.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM; without it, plaintext")
    flags.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM")
    flags.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM; peers are checked against it, clients too")
    flags.add_argument(
        "--tls-allow-client", action="append", metavar="NAME", help="a name that a caller's certificate may have, with "
        f"--tls-ca; may be given again (default: {', '.join(clients) or 'any'})",
    )  # fmt: skip
    flags.set_defaults(default_clients=tuple(clients))
    _add_limits(flags, Limits())
    flags.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return flags


def _add_limits(flags: argparse.ArgumentParser, default: Limits) -> None:
    group = flags.add_argument_group("bounds of the gRPC port; none of them ends a call whose request has come in")
    connections = f"at once; further ones are closed (default: {CONNECTIONS}, at most half of the open files allowed)"
    group.add_argument("--grpc-connections", type=count, metavar="N", help=connections)
    for flag, value, kind, metavar, what in (
        ("streams", default.streams, count, "N", "calls at once on one connection; further ones wait"),
        ("watches", default.watches, count, "N", "streams of health's Watch and reflection; a quarter of one host"),
        ("message-timeout", default.message_s, seconds, "S", "until a call's request has come in"),
        ("handshake-timeout", default.handshake_s, seconds, "S", "for TLS and HTTP/2, then it is closed"),
        ("connection-age", default.age_s, seconds, "S", "of a connection, after which its caller makes another"),
    ):
        told = f"{what} (default: {value:g})"
        group.add_argument(f"--grpc-{flag}", type=kind, default=value, metavar=metavar, help=told)


def limits(args: argparse.Namespace) -> Limits:
    """The bounds of the gRPC port as the flags say; ConfigError for more connections than there are descriptors for."""
    files = limit()
    most = files // 2
    if args.grpc_connections is not None and args.grpc_connections > most:
        raise ConfigError(
            f"--grpc-connections is {args.grpc_connections}; this process may open {files} files, and half of them may "
            f"be connections; give at most {most}, or raise ulimit -n"
        )
    return Limits(
        connections=args.grpc_connections or min(CONNECTIONS, most),
        streams=args.grpc_streams,
        watches=args.grpc_watches,
        message_s=args.grpc_message_timeout,
        handshake_s=args.grpc_handshake_timeout,
        age_s=args.grpc_connection_age,
    )


def add_server_names(flags: argparse.ArgumentParser) -> None:
    """The flag of a service that calls others: which name the certificate of each must have."""
    flags.add_argument(
        "--tls-server-name", type=_named, action="append", default=[], metavar="SERVICE=NAME",
        help="the name that the certificate of a service must have (default: its role, thinker or dit); may be given "
        "again, like thinker-0=a.example",
    )  # fmt: skip


def server_names(args: argparse.Namespace, services: Iterable[str], *, tls: bool) -> dict[str, str]:
    """What --tls-server-name says, by service; ConfigError for one that is not called, or is called in plaintext."""
    names = dict(args.tls_server_name)
    known = set(services)
    for service in names:
        if service not in known:
            told = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"--tls-server-name names {service!r}, which is not called; there is {told}")
    if names and not tls:
        raise ConfigError("--tls-server-name needs TLS to the services; give --tls-ca")
    return names


def add_model_flags(flags: argparse.ArgumentParser, name: str) -> None:
    """Flags of a service that loads the model."""
    flags.add_argument("--model", required=True, help="checkpoint folder or hub name")
    flags.add_argument("--name", default=name, help=f"name under which peers know this service (default: {name})")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    flags.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    flags.add_argument("--max-num-seqs", type=count, default=16, metavar="N", help="requests worked on at once")
    flags.add_argument(
        "--batch-timeout", type=float, default=BATCH_TIMEOUT_S, metavar="S", help="for a place among them, then busy"
    )
    flags.add_argument("--max-model-len", type=count, metavar="N", help="positions of prompt and text together")


def add_image_flags(flags: argparse.ArgumentParser) -> None:
    """Flags of a service that reads images."""
    flags.add_argument(
        "--image-workers",
        type=count,
        default=WORKERS,
        metavar="N",
        help="processes that read images",
    )
    flags.add_argument(
        "--image-timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help=f"seconds to read one image; one that takes longer is refused (default: {TIMEOUT_S:g})",
    )


def image_pool(args: argparse.Namespace) -> ImagePool:
    """What a service reads images with; ConfigError for wrong flags."""
    return ImagePool(args.image_workers, args.image_timeout, args.batch_timeout)


def security(args: argparse.Namespace) -> Security:
    """TLS as the flags say; ConfigError for what does not fit together or cannot be used by a server."""
    clients = args.tls_allow_client
    if clients is None:
        clients = args.default_clients if args.tls_ca is not None else ()
    return Security(args.tls_certificate, args.tls_key, args.tls_ca, clients=tuple(clients))


def unread(args: argparse.Namespace) -> Unread:
    """What may wait for slow readers, as the flags say; ConfigError for what cannot be."""
    return Unread(args.reader_timeout, args.max_unread_bytes)


def named_address(text: str) -> tuple[str, str]:
    """NAME=HOST:PORT as (name, address)."""
    name, _, address = text.partition("=")
    if not name or ":" not in address:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=HOST:PORT, like thinker-0=10.0.0.5:50052")
    return name, address


def announce(host: Host, listen: str, http: str | None = None) -> None:
    """Say on stdout where the service listens, for who started it with port 0. http: where it speaks HTTP too."""
    addresses = {"address": f"{listen.rpartition(':')[0]}:{host.port}", **({"http": http} if http else {})}
    print(json.dumps({"event": "listening", **addresses}), flush=True)
    log.info("listening", **addresses)


def announce_ready() -> None:
    """Say on stdout that the service is ready for the first time."""
    print(json.dumps({"event": "ready"}), flush=True)


async def serve(
    host: Host, drain_s: float, failed: asyncio.Future[None], idle: Callable[[], bool] | None = None
) -> None:
    """Serve until SIGTERM, then drain. An error of `failed` ends it at once: NOT_SERVING, then the error is raised."""
    stopping = asyncio.create_task(host.until_stopped(drain_s, idle))
    await asyncio.wait((stopping, failed), return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        await stopping
        return
    log.error("the service has failed and ends", error=str(failed.exception()))
    stopping.cancel()
    await host.not_ready()
    await host.server.stop(LAST_WORDS_S)
    failed.result()


def run(read: Callable[[], C], main: Callable[[C], Awaitable[None]], service: str) -> int:
    """Run a service, from reading its configuration to its end; the process's exit code.

    A BagelError is one line on stderr.
    """
    try:
        config = read()
        set_up_logs(service, config.log_level)
        raise_limit()
        instance = getattr(config, "name", service)
        set_up_tracing(service, instance)
        set_up_metrics(service, instance)
        asyncio.run(_as_coroutine(main(config)))
    except BagelError as error:
        print(f"error: {for_command_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        shut_down()
    return 0


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


def _named(text: str) -> tuple[str, str]:
    service, _, name = text.partition("=")
    if not (service and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not SERVICE=NAME, like thinker-0=a.example")
    return service, name


def seconds(text: str) -> float:
    """A flag's number of seconds, above 0 and finite."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def count(text: str) -> int:
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
