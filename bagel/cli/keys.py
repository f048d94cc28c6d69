"""`bagel keys new NAME`: a fresh API key, and the line by which a gateway knows it."""

from __future__ import annotations

import argparse

from bagel.cli.outputs import write_out
from bagel.rpc.api_keys import key_line, new_key


def keys(args: argparse.Namespace) -> None:
    """Run the command; the key is written nowhere but to stdout. Raises ConfigError for a name that cannot be one."""
    key = new_key()
    write_out(f"{key}\n{key_line(args.name, key)}\n")
