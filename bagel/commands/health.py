"""`bagel health`: ask one service whether it is ready, as a container's health check does."""

from __future__ import annotations

import argparse

from bagel.commands.endpoint import security_of
from bagel.commands.flags import HEALTH_TIMEOUT_S
from bagel.commands.outputs import write_out
from bagel.errors import ConfigError, NoBackend
from bagel.launch import health_of


def health(args: argparse.Namespace) -> None:
    """Run the command; raises NoBackend unless the service says SERVING."""
    if args.endpoint is None:
        raise ConfigError("no --endpoint; name the service, like --endpoint 127.0.0.1:50051")
    status = health_of(args.endpoint, args.timeout or HEALTH_TIMEOUT_S, security_of(args))
    if status != "SERVING":
        raise NoBackend(f"the service at {args.endpoint} is {status}; its log says why")
    write_out(f"{status}\n")
