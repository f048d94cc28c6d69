"""How the command line speaks to a running gateway: TLS and API key, as flags and environment say. No torch here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bagel.cli.flags import ENDPOINT_FLAGS, flag_name
from bagel.errors import ConfigError
from bagel.rpc.transport import Security
from bagel.text_files import decode_marked

API_KEY = "BAGEL_API_KEY"
"""A key itself: among a command's arguments, every user of the machine would see it."""


def security_of(args: argparse.Namespace) -> Security:
    """TLS as the flags say; ConfigError for a certificate without its key, or the other way round."""
    files = (args.tls_certificate, args.tls_key, args.tls_ca)
    certificate, key, ca = (None if name is None else Path(name) for name in files)
    trusted = bool(getattr(args, "trusted_network", None))  # a flag of the commands that send a key
    return Security(certificate, key, ca, trusted)


def api_key_of(args: argparse.Namespace) -> str | None:
    """The API key of --api-key-file, else of the environment, else none; ConfigError for a file that has none."""
    if args.api_key_file is None:
        # A variable that is set and empty counts as none.
        return os.environ.get(API_KEY, "").strip() or None
    try:
        key = decode_marked(Path(args.api_key_file).read_bytes()).strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--api-key-file {args.api_key_file!r} cannot be read: {reason}") from None
    if not key:
        raise ConfigError(f"--api-key-file {args.api_key_file!r} is empty; it must hold the key")
    return key


def refuse_without_endpoint(args: argparse.Namespace) -> None:
    """Raise ConfigError for such flags of a command that starts what it talks to."""
    given = [flag_name(flag) for flag in ENDPOINT_FLAGS if getattr(args, flag) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: only for a running gateway; add --endpoint HOST:PORT")
