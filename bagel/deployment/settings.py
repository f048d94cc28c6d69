"""Settings of the services. Each is one field of a configuration object, with its default, range and help.

The flag, the checks, the JSON for another process and the line in the log all follow from the field. This module needs
the standard library alone, since the command line reads it for --help.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from bagel.arguments import Parser
from bagel.errors import ConfigError
from bagel.ranges import in_words

JSON_FLAG = "--config-json"
_NOUNS = {
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    bool: "true or false",
    dict: 'JSON of an object, like {"steps": 24}',
}


def setting(help: str, *, default: Any = MISSING, default_factory: Any = MISSING, **say: Any) -> Any:
    """A field of a configuration object; `say` are fields of `Setting`. A setting without a default must be given."""
    return field(default=default, default_factory=default_factory, metadata={"help": help, **say})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a service, by its field.

    kind: of the value, or of each where there are several; optional: None is a value too. help: without the default,
    which is added. flag: where the field's name does not give it. shape: of a text, a regular expression and its words.
    heading: in --help. stage: a key of a deploy file's stage too; section: one of this section of a stage. elsewhere:
    what sets it in `bagel serve`, where that is no flag of the same name. everywhere: `bagel serve` gives it to all
    services, not to the gateway alone.
    """

    name: str
    kind: type
    optional: bool
    several: bool
    default: Any
    required: bool
    help: str
    flag: str
    metavar: str | None = None
    choices: Sequence[Any] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    shape: tuple[str, str] | None = None
    heading: str = ""
    stage: bool = False
    section: str = ""
    elsewhere: str = ""
    everywhere: bool = False

    @property
    def dest(self) -> str:
        """argparse's name of the flag, and the name in the log."""
        return self.flag.strip("-").replace("-", "_")

    def add_to(self, group: argparse._ActionsContainer, *, required: bool = True) -> None:
        """Add the flag. What is not given is None, so that the field's own default holds."""
        how: dict[str, Any] = {"default": None, "help": self._help()}
        if self.kind is bool:
            how["action"] = argparse.BooleanOptionalAction if self.optional else "store_true"
        else:
            how |= {"type": self.read, "metavar": self.metavar, "choices": self.choices}
            how |= {"action": "append"} if self.several else {"required": required and self.required}
        group.add_argument(self.flag, **how)

    def read(self, text: str) -> Any:
        """The value that a flag's text says; argparse tells the user of its error."""
        try:
            value = json.loads(text) if self.kind is dict else self.kind(text)
        except ValueError:
            value = None
        if self.choices is None and not self._holds(value):
            raise argparse.ArgumentTypeError(f"{text!r:.80} is no {self._wanted()}")
        return value if value is not None else text

    def decode(self, value: Any) -> Any:
        """The value that JSON, or a flag of another command, has as this."""
        if self.several and isinstance(value, list):
            return tuple(value)
        return self.kind(value) if isinstance(value, str) and self.kind not in (bool, int, float, dict) else value

    def check(self, value: Any) -> None:
        """Raise ConfigError, naming the setting, for a value that it cannot have."""
        if value is None and self.optional:
            return
        if self.several and not isinstance(value, tuple):
            raise ConfigError(f"{self.dest} is {value!r:.80}; it must be a list", self.dest)
        for each in value if self.several else (value,):
            wanted = ""
            if self.choices is not None and each not in self.choices:
                wanted = f"one of {', '.join(map(str, self.choices))}"
            elif not self._is(each):
                wanted = "a " * (self.kind is not bool) + self._noun()
            elif not self._holds(each):
                wanted = self._range()
            if wanted:
                raise ConfigError(f"{self.dest} is {each!r:.80}; it must be {wanted}", self.dest)

    def _is(self, value: object) -> bool:
        kinds = (int, float) if self.kind is float else self.kind
        return isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))

    def _holds(self, value: Any) -> bool:
        if not self._is(value):
            return False
        if self.kind not in (int, float):
            return self.shape is None or re.fullmatch(self.shape[0], str(value)) is not None
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        return low and value <= (math.inf if self.at_most is None else self.at_most) and math.isfinite(value)

    def _range(self) -> str:
        if self.shape is not None:
            return self.shape[1]
        return in_words(above=self.above, at_least=self.at_least, at_most=self.at_most) + " seconds" * (
            self.metavar == "S"
        )

    def _wanted(self) -> str:
        if self.kind not in (int, float):
            return self._noun() if self.shape is None else self.shape[1]
        ends = in_words(above=self.above, at_least=self.at_least, at_most=self.at_most)
        return f"{self._noun()} {'of ' * (self.kind is int and self.above is None)}{ends}"

    def _noun(self) -> str:
        return _NOUNS.get(self.kind, "text") + " of seconds" * (self.metavar == "S")

    def _help(self) -> str:
        if "(default" in self.help or self.default in (MISSING, None, False, ()):
            return self.help
        value = f"{self.default:g}" if self.kind is float else self.default
        return f"{self.help} (default: {value})".replace("%", "%%").strip()


@dataclass(frozen=True, kw_only=True)
class Config:
    """A service's whole configuration. Raises ConfigError for a value that is wrong, or does not fit to the others."""

    MODULE: ClassVar[str] = ""
    """What runs the service: `python -m MODULE`."""
    ABOUT: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for each in settings_of(type(self)):
            each.check(getattr(self, each.name))
        self.check()

    def check(self) -> None:
        """Raise ConfigError for values that do not fit together."""

    @classmethod
    def parser(cls) -> Parser:
        """A parser of the service's flags."""
        flags = Parser(prog=f"python -m {cls.MODULE}", description=cls.ABOUT)
        add_flags(flags, settings_of(cls))
        flags.add_argument(
            JSON_FLAG, metavar="JSON", help="all settings, from another process; no other flag beside it"
        )
        return flags

    @classmethod
    def read(cls, argv: Sequence[str] | None = None) -> Self:
        """The configuration that the command line says."""
        argv = sys.argv[1:] if argv is None else argv
        if argv and argv[0] == JSON_FLAG and len(argv) == 2:
            return cls.from_json(argv[1])
        args = cls.parser().parse_args(argv)
        if args.config_json is not None:
            raise ConfigError(f"{JSON_FLAG} is the whole configuration; give no other flag beside it")
        return cls(**given(vars(args), settings_of(cls)))

    def to_json(self) -> str:
        """The configuration for another process, in one line."""
        return json.dumps({each.name: getattr(self, each.name) for each in settings_of(type(self))}, default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` has written. What is left out has its default."""
        known = {each.name: each for each in settings_of(cls)}
        try:
            values = dict(json.loads(text))
            return cls(**{name: known[name].decode(value) for name, value in values.items()})
        except KeyError as error:
            raise ConfigError(f"{JSON_FLAG}: {cls.MODULE} has no setting {error}") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{JSON_FLAG} is no configuration of {cls.MODULE}: {error}") from None

    def shown(self) -> dict[str, object]:
        """The configuration for the log, by the names of the flags."""
        return {each.dest: getattr(self, each.name) for each in settings_of(type(self))}


def settings_of(cls: type[Config]) -> tuple[Setting, ...]:
    """The settings of a configuration, in the order of their fields."""
    hints = get_type_hints(cls)
    found = []
    for each in fields(cls):
        options = get_args(hints[each.name]) if isinstance(hints[each.name], UnionType) else (hints[each.name],)
        kind = next(option for option in options if option is not type(None))
        several = get_origin(kind) is tuple
        say = {"flag": flag_of(each.name), **each.metadata}
        kind = get_args(kind)[0] if several else get_origin(kind) or kind
        how = {"kind": kind, "several": several, "optional": len(options) > 1}
        how["required"] = each.default is MISSING and each.default_factory is MISSING
        found.append(Setting(name=each.name, default=each.default, **how, **say))
    return tuple(found)


def flag_of(name: str) -> str:
    """The flag of a field: its name without the unit."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, settings: Sequence[Setting]) -> None:
    """Add the flags of settings, each under its heading."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for each in settings:
        if each.heading not in groups:
            groups[each.heading] = parser.add_argument_group(each.heading)
        each.add_to(groups[each.heading])


def given(values: Mapping[str, Any], settings: Sequence[Setting]) -> dict[str, Any]:
    """The values that were given, out of those of argparse, by the names of the fields."""
    found = {each: values[each.dest] for each in settings if values.get(each.dest) is not None}
    return {each.name: each.decode(value) for each, value in found.items()}
