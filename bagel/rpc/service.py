"""What the three services' processes have in common: their start and their end. No torch here."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn, Protocol, TypeVar

from bagel.arguments import for_command_line
from bagel.errors import BagelError, ConfigError
from bagel.rpc.open_files import raise_limit
from bagel.rpc.transport import Host
from bagel.telemetry.logs import Log, set_up_logs
from bagel.telemetry.metrics import set_up_metrics
from bagel.telemetry.otlp import shut_down
from bagel.telemetry.tracing import set_up_tracing

LAST_WORDS_S = 1.0
"""Seconds that a failed service has to send its callers their errors before it ends."""

log = Log("bagel.service")


class Logging(Protocol):
    """A service's configuration, as far as its start needs it. One that peers know by a name has that too."""

    @property
    def log_level(self) -> str: ...


C = TypeVar("C", bound=Logging)


def announce(host: Host, listen: str, http: str | None = None) -> None:
    """Print where the service listens, for a parent that started it with port 0. http: where it speaks HTTP too."""
    addresses = {"address": f"{listen.rpartition(':')[0]}:{host.port}", **({"http": http} if http else {})}
    print(json.dumps({"event": "listening", **addresses}), flush=True)
    log.info("listening", **addresses)


def announce_ready() -> None:
    """Say on stdout that the service is ready for the first time."""
    print(json.dumps({"event": "ready"}), flush=True)


def _announce_stopped() -> None:
    """Say on stdout that the service's work is over: what is left is the last export of telemetry, which may wait."""
    with suppress(OSError, ValueError):  # nobody may read it any more
        print(json.dumps({"event": "stopped"}), flush=True)


def check_temporary_folder() -> None:
    """Raise ConfigError if no temporary file can be written, as PyTorch must when it is loaded: a disk may be full."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise ConfigError(f"{error.strerror}: free some space there, or set TMPDIR to a folder that has some") from None


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
    # Probes hear of it first; then callers have a moment to get their errors.
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
        instance: str = getattr(config, "name", service)
        set_up_tracing(service, instance)
        set_up_metrics(service, instance)
        asyncio.run(_as_coroutine(main(config)))
        _announce_stopped()
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


def leave(code: int) -> NoReturn:
    """End the process once its work is over, without taking the interpreter down.

    Python ends threads that come back from C then, which aborts the process where gRPC's C++ is below them. What is
    registered with atexit runs as ever: files of shared memory are removed, child processes end.
    """
    atexit._run_exitfuncs()
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """End the process as it is."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody may read it any more
            stream.flush()
    os._exit(code)
