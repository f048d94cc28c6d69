"""`bagel health`: ask one service whether it is ready, as a container's health check does."""

from __future__ import annotations

import argparse

from bagel.arguments import for_command_line
from bagel.cli.endpoint import security_of
from bagel.cli.flags import HEALTH_TIMEOUT_S
from bagel.cli.outputs import write_out
from bagel.deployment.launcher import UNREACHABLE, health_of
from bagel.errors import ConfigError, NoBackend
from bagel.rpc.reach import unreachable


def health(args: argparse.Namespace) -> None:
    """Run the command; raises NoBackend unless the service says SERVING, and the cause if it cannot be reached."""
    if args.endpoint is None:
        raise ConfigError("no --endpoint; name the service, like --endpoint 127.0.0.1:50051")
    security = security_of(args)
    status = health_of(args.endpoint, args.timeout or HEALTH_TIMEOUT_S, security)
    # A second look says why: nothing listens, or TLS does not fit.
    if status == UNREACHABLE:
        raise NoBackend(for_command_line(unreachable("service", args.endpoint, security)))
    if status != "SERVING":
        raise NoBackend(f"the service at {args.endpoint} is {status}; its log says why")
    write_out(f"{status}\n")
