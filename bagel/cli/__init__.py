"""The command `bagel`, one module a subcommand. No torch here: the engine is reached by its module's name."""

from bagel.cli.command import main

__all__ = ["main"]
