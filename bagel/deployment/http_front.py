"""How the gateway's HTTP front guards itself: its settings, and their flags, which `bagel serve` passes on.

Standard library alone, as all that the command line reads for --help.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from bagel.errors import ConfigError

MIB = 2**20
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_HOST = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class HttpGuards:
    """What the HTTP front bears with. Raises ConfigError for values that make no sense.

    max_body_bytes: of one request, max_text_body_bytes: where no image can be in it; max_json_values, max_json_depth:
    of a JSON body. max_connections: at once; None: 512, or fewer where the process may not open as many files.
    header_timeout_s: for a request's head, idle_timeout_s: between two requests of a connection. A body ends with an
    error when fewer than min_body_rate bytes a second came within body_timeout_s. allow_hosts: names that the front is
    called by, beside its own; allow_origins: of pages elsewhere that may call it ("*": all).
    """

    max_body_bytes: int = 64 * MIB
    max_text_body_bytes: int = 4 * MIB
    max_json_values: int = 10_000
    max_json_depth: int = 64
    max_connections: int | None = None
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    body_timeout_s: float = 30.0
    min_body_rate: int = 4096
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag in FLAGS:
            value = getattr(self, flag.field)
            if flag.kind is int and value is not None and value < flag.least:
                raise ConfigError(f"{flag.name} is {value}; it must be at least {flag.least}")
            if flag.kind is float and not _SHORTEST_S <= value <= _LONGEST_S:
                raise ConfigError(
                    f"{flag.name} is {value:g}; it must be from {_SHORTEST_S} to {_LONGEST_S:.0f} seconds"
                )
        for host in self.allow_hosts:
            if host != "*" and not _HOST.fullmatch(host):
                raise ConfigError(f"--allow-host is {host!r:.200}; write a name alone in small letters, like bagel.lan")
        for origin in self.allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allow-origin is {origin!r:.200}; write scheme://host or scheme://host:port in small letters, "
                    "like https://app.example"
                )
            if re.fullmatch("http:.*:80|https:.*:443", origin):
                raise ConfigError(
                    f"--allow-origin is {origin!r:.200}; browsers leave out the scheme's own port: write "
                    f"{origin.rpartition(':')[0]}"
                )

    def shown(self) -> dict[str, object]:
        """The settings for the log."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class Flag:
    """One flag, and the field that it sets. kind tuple: it may be given again."""

    field: str
    name: str
    kind: type
    metavar: str
    meaning: str
    least: int = 1


_SHORTEST_S, _LONGEST_S = 0.1, 86_400.0
FLAGS: Sequence[Flag] = (
    Flag("max_body_bytes", "--max-body-bytes", int, "N", "bytes of one HTTP request"),
    Flag("max_text_body_bytes", "--max-text-body-bytes", int, "N", "bytes of one that can hold no image"),
    Flag("max_json_values", "--max-json-values", int, "N", "values in a JSON body"),
    Flag("max_json_depth", "--max-json-depth", int, "N", "objects and lists within each other in it", 2),
    Flag("max_connections", "--max-connections", int, "N", "HTTP connections at once"),
    Flag("header_timeout_s", "--header-timeout", float, "S", "seconds for the head of an HTTP request"),
    Flag("idle_timeout_s", "--idle-timeout", float, "S", "seconds between two requests of a connection"),
    Flag("body_timeout_s", "--body-timeout", float, "S", "seconds in which --min-body-rate is held"),
    Flag("min_body_rate", "--min-body-rate", int, "N", "bytes a second that a body must come with"),
    Flag("allow_hosts", "--allow-host", tuple, "NAME", "a host name that the HTTP front is called by; may be repeated"),
    Flag("allow_origins", "--allow-origin", tuple, "ORIGIN", "web pages of it may call (CORS); may be repeated"),
)


def add_http_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags; what is not given is None."""
    for flag in FLAGS:
        default = getattr(_DEFAULTS, flag.field)
        told = f"{default:g}" if isinstance(default, float) else _TOLD.get(default, default)
        how: dict[str, Any] = {"action": "append"} if flag.kind is tuple else {"type": _reader(flag.kind)}
        group.add_argument(
            flag.name, default=None, metavar=flag.metavar, help=f"{flag.meaning} (default: {told})", **how
        )


def http_guards(args: argparse.Namespace) -> HttpGuards:
    """The settings that the flags say; ConfigError for wrong ones."""
    given = {flag.field: getattr(args, flag.name.strip("-").replace("-", "_")) for flag in FLAGS}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    return HttpGuards(**values)


def http_arguments(guards: HttpGuards) -> list[str]:
    """The flags that say these settings, defaults left out."""
    arguments: list[str] = []
    for flag in FLAGS:
        value, default = getattr(guards, flag.field), getattr(_DEFAULTS, flag.field)
        if flag.kind is tuple:
            arguments += [f"{flag.name}={each}" for each in value]
        elif value != default:
            arguments.append(f"{flag.name}={value}")
    return arguments


_DEFAULTS = HttpGuards()
_TOLD: dict[object, str] = {None: "512, fewer where fewer files may be open", (): "none"}


def _reader(kind: type) -> Any:
    def read(text: str) -> int | float:
        try:
            return int(text) if kind is int else float(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r:.80} is no {what}") from None

    return read
