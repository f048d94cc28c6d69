"""The settings of the gateway's HTTP front. No torch here; the command line reads them for --help."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bagel.deployment.settings import Config, setting, settings_of
from bagel.errors import ConfigError

MIB = 2**20
COMPAT = ("none", "vllm-omni")
"""Values of --compat: whose clients' requests are taken beside those of docs/rest.md."""
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_HOST = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+")
_SHORTEST_S, _LONGEST_S = 0.1, 86_400.0


@dataclass(frozen=True, kw_only=True)
class HttpFront(Config):
    """Where the gateway speaks the OpenAI API, if anywhere, and what it bears with there."""

    http: str | None = setting(
        "also speak the OpenAI API there; port 0: any free one (default: not)",
        default=None, metavar="HOST:PORT",
        shape=(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/]+):[0-9]{1,5}", "HOST:PORT, like 127.0.0.1:8000"),
    )  # fmt: skip
    served_model_names: tuple[str, ...] = setting(
        "its name there; again: its aliases", default=(), flag="--served-model-name", metavar="NAME"
    )
    compat: str = setting("take the requests of its clients there too", default="none", choices=COMPAT)
    allow_image_hosts: tuple[str, ...] = setting(
        "fetch https images from it", default=(), flag="--allow-image-host", metavar="HOST"
    )
    max_body_bytes: int = setting("bytes of one HTTP request", default=64 * MIB, metavar="N", at_least=1)
    max_text_body_bytes: int = setting("bytes of one that can hold no image", default=4 * MIB, metavar="N", at_least=1)
    max_json_values: int = setting("values in a JSON body", default=10_000, metavar="N", at_least=1)
    max_json_depth: int = setting("objects and lists within each other in it", default=64, metavar="N", at_least=2)
    max_connections: int | None = setting(
        "HTTP connections at once (default: 512, fewer where fewer files may be open)",
        default=None, metavar="N", at_least=1,
    )  # fmt: skip
    header_timeout_s: float = setting(
        "seconds for the head of an HTTP request",
        default=10.0, metavar="S", at_least=_SHORTEST_S, at_most=_LONGEST_S,
    )  # fmt: skip
    idle_timeout_s: float = setting(
        "seconds between two requests of a connection",
        default=75.0, metavar="S", at_least=_SHORTEST_S, at_most=_LONGEST_S,
    )  # fmt: skip
    body_timeout_s: float = setting(
        "seconds in which --min-body-rate is held",
        default=30.0, metavar="S", at_least=_SHORTEST_S, at_most=_LONGEST_S,
    )  # fmt: skip
    min_body_rate: int = setting("bytes a second that a body must come with", default=4096, metavar="N", at_least=1)
    allow_hosts: tuple[str, ...] = setting(
        "a host name that the HTTP front is called by; may be repeated (default: none)",
        default=(), flag="--allow-host", metavar="NAME",
    )  # fmt: skip
    allow_origins: tuple[str, ...] = setting(
        "web pages of it may call (CORS); may be repeated (default: none)",
        default=(), flag="--allow-origin", metavar="ORIGIN",
    )  # fmt: skip

    def check(self) -> None:
        """Raise ConfigError for what is set without --http, and for hosts and origins that no browser would send."""
        super().check()
        for each in settings_of(HttpFront):
            if self.http is None and getattr(self, each.name) != each.default:
                raise ConfigError(f"{each.flag} has no effect without --http; give --http HOST:PORT, or leave it out")
        for host in self.allow_hosts:
            if host != "*" and not _HOST.fullmatch(host):
                raise ConfigError(f"--allow-host is {host!r:.200}; write a name alone in small letters, like bagel.lan")
        for origin in self.allow_origins:
            _check_origin(origin)


def _check_origin(origin: str) -> None:
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ConfigError(
            f"--allow-origin is {origin!r:.200}; write scheme://host or scheme://host:port in small letters, like "
            "https://app.example"
        )
    if re.fullmatch("http:.*:80|https:.*:443", origin):
        raise ConfigError(
            f"--allow-origin is {origin!r:.200}; browsers leave out the scheme's own port: write "
            f"{origin.rpartition(':')[0]}"
        )


GUARDS = tuple(
    each for each in settings_of(HttpFront) if each.name not in ("http", "served_model_names", "allow_image_hosts")
)
"""What the front bears with."""
