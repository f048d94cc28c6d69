"""The TLS flags of the command line as what a channel or a server takes. No torch here."""

from __future__ import annotations

import argparse
from pathlib import Path

from bagel.commands.flags import TLS_FLAGS, flag_name
from bagel.errors import ConfigError
from bagel.transport import Security


def security_of(args: argparse.Namespace) -> Security:
    """TLS as the flags say; ConfigError for a certificate without its key, or the other way round."""
    return Security(*(None if value is None else Path(value) for value in _values(args)))


def refuse_without_endpoint(args: argparse.Namespace) -> None:
    """Raise ConfigError for TLS flags of a command that starts what it talks to."""
    given = [flag_name(flag) for flag, value in zip(TLS_FLAGS, _values(args), strict=True) if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: TLS is for a running gateway; add --endpoint HOST:PORT")


def _values(args: argparse.Namespace) -> list[str | None]:
    return [getattr(args, flag) for flag in TLS_FLAGS]
