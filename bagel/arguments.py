"""Command lines: no flag is guessed, none silently overrides itself, and an error is one line.

Imports the standard library alone, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from bagel.errors import BagelError, ConfigError, InitTimeout


class OnceParser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated flags and lets no flag silently override itself.

    A flag may be repeated only with the same value, or if it collects several values.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})
        self._arguments: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and refuse a flag that is given twice with different values."""
        self._arguments = sys.argv[1:] if args is None else list(args)
        # Changed here, where all actions are known: argument groups add theirs without this class's add_argument.
        for action in self._actions:
            if action.option_strings and not isinstance(action, _COLLECTING):
                if not isinstance(action, _Once):
                    action.__class__ = type("Once", (_Once, type(action)), {})
                vars(action).pop("given", None)  # a parser may parse several times
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(message + self._dash_hint(message))

    def _dash_hint(self, message: str) -> str:
        """How to pass a value that looks like a flag, if argparse took one for a flag and misses the value."""
        found = re.match(r"argument (?:\S*/)?(--\S+): expected (?:one|at least one) argument", message)
        if found is None or found[1] not in self._arguments:
            return ""
        after = [*self._arguments, ""][self._arguments.index(found[1]) + 1]
        if not after.startswith("-") or any(after in action.option_strings for action in self._actions):
            return ""
        return f"; a value that begins with a dash goes behind =, as in {found[1]}={shlex.quote(after)}"


class _Once:
    """A mixin for actions that would overwrite the value of an earlier use of their flag."""

    given: tuple[object]

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        # --x and --no-x share one action and have no values; the option that was used tells them apart.
        value = (values, option if isinstance(self, argparse.BooleanOptionalAction) else None)
        before = vars(self).setdefault("given", value)
        if before != value:
            shown = " and ".join(_shown(each) for each in (before, value))
            raise argparse.ArgumentError(cast(argparse.Action, self), f"it is given twice, {shown}; give it once")
        cast(Any, super()).__call__(parser, namespace, values, option)


def _shown(value: tuple[Any, str | None]) -> str:
    values, option = value
    if option is not None:
        return option
    return " ".join(map(str, values)) if isinstance(values, list) else f"as {values!r:.80}"


_COLLECTING = (
    argparse._AppendAction,
    argparse._ExtendAction,
    argparse._HelpAction,
    argparse._VersionAction,
    argparse._SubParsersAction,
)


class KeptExamples(argparse.HelpFormatter):
    """Help whose texts of several lines, such as examples, keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(OnceParser):
    """A parser that raises its errors as a ConfigError of one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}{self._dash_hint(message)}; see {self.prog} --help")


def for_command_line(error: BagelError) -> str:
    """The error's message with flags in place of the settings that it names: image_workers -> --image-workers."""
    message = str(error)
    for field in error.fields if isinstance(error, ConfigError | InitTimeout) else ():
        # Not within a path, whose file may be called tls_key.pem.
        message = re.sub(rf"(?<![\w./-]){field}(?![\w./-])", "--" + field.replace("_", "-"), message)
    return message
