"""The gateway's configuration: its flags, checked as they are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bagel.errors import ConfigError, InvalidRequest
from bagel.pipelines import BAGEL, BAGEL_SINGLE_STAGE, PIPELINES, PipelineConfig, pipeline
from bagel.prompts import TextPart
from bagel.request import Modality, resolve
from bagel.transport import DRAIN_S, PLAINTEXT, Security
from bagel_gateway.backends import CHECK_EVERY_S, Address

MAX_REQUESTS = 64
BATCH_TIMEOUT_S = 5.0
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a gateway is started with. Raises ConfigError for what does not fit together.

    batch_timeout_s: seconds that a request waits for a place before it is refused as Busy; sampling_defaults: the
    deploy file's defaults for what a request leaves open.
    """

    listen: str
    pipeline: PipelineConfig = BAGEL
    thinkers: tuple[Address, ...] = ()
    dits: tuple[Address, ...] = ()
    max_requests: int = MAX_REQUESTS
    batch_timeout_s: float = BATCH_TIMEOUT_S
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    drain_timeout_s: float = DRAIN_S
    check_every_s: float = CHECK_EVERY_S
    security: Security = PLAINTEXT
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        single = self.pipeline is BAGEL_SINGLE_STAGE
        if single and self.thinkers:
            raise ConfigError(f"{self.pipeline.model_type} has no Thinker; leave --thinker out")
        if not single and not self.thinkers:
            raise ConfigError(f"{self.pipeline.model_type} needs a Thinker; give --thinker thinker-0=HOST:PORT")
        if not self.dits:
            raise ConfigError("there is no DiT; give --dit dit-0=HOST:PORT")
        names = [address.name for address in (*self.thinkers, *self.dits)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"two services are called {min(twice)}; give each its own name")
        if self.max_requests < 1:
            raise ConfigError(f"--max-requests is {self.max_requests}; it must be at least 1")
        for flag, seconds in (("--batch-timeout", self.batch_timeout_s), ("--drain-timeout", self.drain_timeout_s)):
            if not 0 <= seconds < float("inf"):
                raise ConfigError(f"{flag} is {seconds}; it must be 0 or more seconds")
        _check_defaults(self.sampling_defaults)

    def shown(self) -> dict[str, object]:
        """The configuration for the log."""
        return {
            "listen": self.listen,
            "pipeline": self.pipeline.model_type,
            "thinkers": [str(address) for address in self.thinkers],
            "dits": [str(address) for address in self.dits],
            "max_requests": self.max_requests,
            "batch_timeout": self.batch_timeout_s,
            "sampling_defaults": dict(self.sampling_defaults),
            "drain_timeout": self.drain_timeout_s,
            "tls": self.security != PLAINTEXT,
        }

    def say_listening(self, port: int) -> None:
        """Write the address to standard output, for whoever started this process."""
        host = self.listen.rpartition(":")[0]
        print(json.dumps({"event": "listening", "address": f"{host}:{port}"}), flush=True)


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line; ConfigError for a wrong one. --help prints and exits."""
    given = _parser().parse_args(args)
    return Settings(
        listen=given.listen,
        pipeline=pipeline(given.pipeline),
        thinkers=tuple(map(Address.parse, given.thinker)),
        dits=tuple(map(Address.parse, given.dit)),
        max_requests=given.max_requests,
        batch_timeout_s=given.batch_timeout,
        sampling_defaults=_read_json(given.sampling_defaults),
        drain_timeout_s=given.drain_timeout,
        security=Security(given.tls_certificate, given.tls_key, given.tls_ca),
        log_level=given.log_level,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, so that every wrong setting is told alike."""
        raise ConfigError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bagel_gateway", description="The gateway of bagel-serving.", allow_abbrev=False)
    add = parser.add_argument
    add("--listen", required=True, metavar="HOST:PORT", help="where to listen; port 0 is any free one")
    add("--pipeline", default=BAGEL.model_type, choices=list(PIPELINES), help="the topology (default: bagel)")
    add("--thinker", action="append", default=[], metavar="NAME=HOST:PORT", help="a Thinker; may be repeated")
    add("--dit", action="append", default=[], metavar="NAME=HOST:PORT", help="a DiT; may be repeated")
    add("--max-requests", type=int, default=MAX_REQUESTS, metavar="N", help="requests under way at once")
    add("--batch-timeout", type=float, default=BATCH_TIMEOUT_S, metavar="S", help="seconds to wait for a place")
    add("--sampling-defaults", default="{}", metavar="JSON", help="defaults for what requests leave open")
    add("--drain-timeout", type=float, default=DRAIN_S, metavar="S", help="seconds for what is under way at the end")
    add("--tls-certificate", type=Path, metavar="FILE", help="this service's certificate (PEM)")
    add("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    add("--tls-ca", type=Path, metavar="FILE", help="what the other side is checked against (PEM)")
    add("--log-level", default="INFO", choices=LOG_LEVELS)
    return parser


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--sampling-defaults is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f'--sampling-defaults is {text}; it must be an object, like {{"steps": 24}}')
    return value


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    for modality in Modality:
        try:
            resolve(modality, (TextPart("checked"),), {}, defaults)
        except InvalidRequest as error:
            raise ConfigError(f"--sampling-defaults: {error}") from None
