"""The gateway's configuration: its flags, checked as they are read."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bagel.deployment.http_front import HttpGuards, add_http_flags, http_arguments, http_guards
from bagel.errors import ConfigError, InvalidRequest
from bagel.images.pool import TIMEOUT_S, WORKERS
from bagel.pipelines import BAGEL, PIPELINES, PipelineConfig, pipeline
from bagel.prompts import TextPart
from bagel.request import Modality, resolve
from bagel.rpc import service
from bagel.rpc.api_keys import KEYS_FILE, is_local, key_file
from bagel.rpc.limits import DRAIN_S, MAX_UNREAD_BYTES, MAX_UNREAD_CALL_BYTES, READER_TIMEOUT_S
from bagel.rpc.transport import MAX_MESSAGE_BYTES, PLAINTEXT, Limits, Security
from bagel.rpc.unread import Unread
from bagel_gateway.backends import CHECK_EVERY_S, SILENCE_S, Address
from bagel_gateway.images import MAX_IMAGE_PIXELS, MAX_IMAGES, MOST_IMAGES

MAX_REQUESTS = 64
BATCH_TIMEOUT_S = service.BATCH_TIMEOUT_S
MAX_BYTES_IN_FLIGHT = 192 * 2**20
"""Three of the largest bodies and messages; what the gateway then takes in all is in docs/operate.md."""
BACKEND_TIMEOUT_S = 15.0
"""Longer than a runner that died takes to come back with a small model."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a gateway is started with. Raises ConfigError for what does not fit together.

    batch_timeout_s: seconds that a request waits for a place before it is refused as Busy; backend_timeout_s: for a
    service that is ready; silence_timeout_s: that a service may answer no check before its calls are ended;
    sampling_defaults: the deploy file's defaults for what a request leaves open. front_security: TLS of the gateway's
    own ports; security: of its calls to the services, whose certificates must be for server_names, by default for their
    roles. grpc: bounds of the gRPC port. http: host:port of the REST front; model_names: what the model is
    called there, the aliases after its name; image_hosts: hosts that images are fetched from, none by default;
    guards: what the REST front bears with; max_bytes_in_flight: of all requests together, on both fronts; max_images,
    max_image_pixels: of one; image_workers: processes that look at images, each at one for at most
    image_timeout_s. api_keys: the file of the keys that callers need, on both fronts; none: anyone may call. log_stats:
    log where the time of each request went. reader_timeout_s: that a client may take nothing of its answer before its
    call is ended; max_unread_bytes: of all answers that wait for their clients, …_per_call: of one.
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
    silence_timeout_s: float = SILENCE_S
    backend_timeout_s: float = BACKEND_TIMEOUT_S
    security: Security = PLAINTEXT
    server_names: Mapping[str, str] = field(default_factory=dict)
    front_security: Security = PLAINTEXT
    grpc: Limits = field(default_factory=Limits)
    http: str | None = None
    model_names: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    guards: HttpGuards = field(default_factory=HttpGuards)
    max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT
    max_images: int = MAX_IMAGES
    max_image_pixels: int = MAX_IMAGE_PIXELS
    image_workers: int = WORKERS
    image_timeout_s: float = TIMEOUT_S
    api_keys: Path | None = None
    log_stats: bool = False
    reader_timeout_s: float = READER_TIMEOUT_S
    max_unread_bytes: int = MAX_UNREAD_BYTES
    max_unread_bytes_per_call: int = MAX_UNREAD_CALL_BYTES

    def __post_init__(self) -> None:
        single = "thinker" not in {stage.model_stage for stage in self.pipeline.stages}
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
        if self.http is not None and not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/]+):[0-9]{1,5}", self.http):
            raise ConfigError(f"--http is {self.http!r}; write HOST:PORT, like 127.0.0.1:8000")
        if self.http is None and (given := http_arguments(self.guards)):
            flag = given[0].partition("=")[0]
            raise ConfigError(f"{flag} has no effect without --http; give --http HOST:PORT, or leave it out")
        counts = {
            "--max-image-pixels": self.max_image_pixels,
            "--image-workers": self.image_workers,
        }
        for flag, count in counts.items():
            if count < 1:
                raise ConfigError(f"{flag} is {count}; it must be at least 1")
        if not 1 <= self.max_images <= MOST_IMAGES:
            raise ConfigError(f"--max-images is {self.max_images}; it must be from 1 to {MOST_IMAGES}")
        largest = max(self.guards.max_body_bytes, MAX_MESSAGE_BYTES)
        if self.max_bytes_in_flight < largest:
            raise ConfigError(
                f"--max-bytes-in-flight is {self.max_bytes_in_flight}; it must be at least {largest}, one request's"
            )
        times = {
            "--batch-timeout": self.batch_timeout_s,
            "--drain-timeout": self.drain_timeout_s,
            "--silence-timeout": self.silence_timeout_s,
            "--backend-timeout": self.backend_timeout_s,
        }
        for flag, seconds in times.items():
            if not 0 <= seconds < float("inf"):
                raise ConfigError(f"{flag} is {seconds}; it must be 0 or more seconds")
        self.unread()
        _check_defaults(self.sampling_defaults)

    def unread(self) -> Unread:
        """A new account of what waits for clients that read slowly, with these limits."""
        return Unread(self.reader_timeout_s, self.max_unread_bytes, self.max_unread_bytes_per_call)

    @property
    def exposes_keys(self) -> bool:
        """Whether callers on other machines send their API keys in plaintext."""
        fronts = (address for address in (self.listen, self.http) if address is not None)
        plaintext = not self.front_security.serves_tls
        return self.api_keys is not None and plaintext and not all(map(is_local, fronts))

    def shown(self) -> dict[str, object]:
        """The configuration for the log."""
        return {
            "listen": self.listen,
            "pipeline": self.pipeline.model_type,
            "thinkers": [str(address) for address in self.thinkers],
            "dits": [str(address) for address in self.dits],
            "max_requests": self.max_requests,
            "batch_timeout": self.batch_timeout_s,
            "silence_timeout": self.silence_timeout_s,
            "backend_timeout": self.backend_timeout_s,
            "sampling_defaults": dict(self.sampling_defaults),
            "drain_timeout": self.drain_timeout_s,
            "http": self.http,
            "model_names": list(self.model_names),
            "image_hosts": list(self.image_hosts),
            "http_guards": self.guards.shown(),
            "max_bytes_in_flight": self.max_bytes_in_flight,
            "max_images": self.max_images,
            "max_image_pixels": self.max_image_pixels,
            "image_workers": self.image_workers,
            "image_timeout": self.image_timeout_s,
            "log_stats": self.log_stats,
            "reader_timeout": self.reader_timeout_s,
            "max_unread_bytes": self.max_unread_bytes,
            "max_unread_bytes_per_call": self.max_unread_bytes_per_call,
            "tls": self.front_security.serves_tls,
            "tls_clients": list(self.front_security.clients) or ("any" if self.front_security.ca else "not asked"),
            "tls_to_services": self.security.encrypted,
            "tls_server_names": dict(self.server_names),
            "grpc": asdict(self.grpc),
            "api_keys": None if self.api_keys is None else str(self.api_keys),
        }


def parser() -> argparse.ArgumentParser:
    """The gateway's flags."""
    flags = service.parser("bagel_gateway", "Takes requests, sends them through the stages.", "127.0.0.1:50051")
    add = flags.add_argument
    add("--pipeline", default=BAGEL.model_type, choices=list(PIPELINES), help="the topology (default: bagel)")
    add("--thinker", action="append", default=[], metavar="NAME=HOST:PORT", help="a Thinker; may be repeated")
    add("--dit", action="append", default=[], metavar="NAME=HOST:PORT", help="a DiT; may be repeated")
    add("--max-requests", type=int, default=MAX_REQUESTS, metavar="N", help="requests under way at once")
    add("--batch-timeout", type=float, default=BATCH_TIMEOUT_S, metavar="S", help="seconds to wait for a place")
    add("--silence-timeout", type=float, default=SILENCE_S, metavar="S", help="of a service, then its calls are ended")
    add("--backend-timeout", type=float, default=BACKEND_TIMEOUT_S, metavar="S", help="to wait for a ready service")
    add("--tls-any-client", action="store_true", help="callers need no certificate; --tls-ca is for the services alone")
    add("--plaintext-services", action="store_true", help="TLS is for callers alone: the services are on this machine")
    add(
        "--plaintext-front", action="store_true", help="TLS is for the services alone, as behind a proxy that speaks it"
    )
    service.add_server_names(flags)
    add("--sampling-defaults", default="{}", metavar="JSON", help="defaults for what requests leave open")
    add("--http", metavar="HOST:PORT", help="also speak the OpenAI API there; port 0: any free one (default: not)")
    add("--served-model-name", action="append", default=[], metavar="NAME", help="its name there; again: its aliases")
    add("--allow-image-host", action="append", default=[], metavar="HOST", help="fetch https images from it")
    add(
        "--max-unread-bytes-per-call",
        type=int,
        default=MAX_UNREAD_CALL_BYTES,
        metavar="N",
        help=f"of one answer that waits for its client (default: {MAX_UNREAD_CALL_BYTES})",
    )
    add(
        "--max-bytes-in-flight", type=int, default=MAX_BYTES_IN_FLIGHT, metavar="N",
        help="of all requests together, gRPC and HTTP; more are refused as busy",
    )  # fmt: skip
    add("--max-images", type=int, default=MAX_IMAGES, metavar="N", help="input images of one request")
    add("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, metavar="N", help="of one request's images together")
    service.add_image_flags(flags)
    add("--api-keys", type=Path, metavar="FILE", help=f"callers need one of them (default: {KEYS_FILE}'s, else none)")
    add("--log-stats", action="store_true", help="log where the time of each request went")
    add_http_flags(flags)
    return flags


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings from the flags; ConfigError for wrong ones."""
    front, inner = _front_and_inner(args)
    names = [address.partition("=")[0] for address in (*args.thinker, *args.dit)]
    return Settings(
        listen=args.listen,
        pipeline=pipeline(args.pipeline),
        thinkers=tuple(map(Address.parse, args.thinker)),
        dits=tuple(map(Address.parse, args.dit)),
        max_requests=args.max_requests,
        batch_timeout_s=args.batch_timeout,
        silence_timeout_s=args.silence_timeout,
        backend_timeout_s=args.backend_timeout,
        sampling_defaults=_read_json(args.sampling_defaults),
        drain_timeout_s=args.drain_timeout,
        http=args.http,
        model_names=tuple(args.served_model_name),
        image_hosts=tuple(args.allow_image_host),
        guards=http_guards(args),
        max_bytes_in_flight=args.max_bytes_in_flight,
        max_images=args.max_images,
        max_image_pixels=args.max_image_pixels,
        image_workers=args.image_workers,
        image_timeout_s=args.image_timeout,
        api_keys=key_file(args.api_keys),
        log_stats=args.log_stats,
        reader_timeout_s=args.reader_timeout,
        max_unread_bytes=args.max_unread_bytes,
        max_unread_bytes_per_call=args.max_unread_bytes_per_call,
        security=inner,
        server_names=service.server_names(args, names, tls=inner.encrypted),
        front_security=front,
        grpc=service.limits(args),
    )


def _front_and_inner(args: argparse.Namespace) -> tuple[Security, Security]:
    """TLS of the gateway's own ports, and of its calls to the services; ConfigError for flags that mean nothing."""
    secure = service.security(args)
    inner = PLAINTEXT if args.plaintext_services else replace(secure, clients=())
    if args.plaintext_front:
        if not inner.encrypted:
            raise ConfigError("--plaintext-front leaves TLS to the services, and there is none; give --tls-ca")
        if args.tls_any_client or args.tls_allow_client:
            raise ConfigError(
                "--plaintext-front asks nobody for a certificate; leave out --tls-any-client and the like"
            )
        return PLAINTEXT, inner
    if args.tls_any_client and args.tls_allow_client:
        raise ConfigError("--tls-any-client and --tls-allow-client exclude each other; give one of them")
    if args.tls_any_client and (args.tls_ca is None or args.plaintext_services):
        raise ConfigError("--tls-any-client leaves --tls-ca to the services, which are not asked; give --tls-ca alone")
    if secure.ca is not None and secure.certificate is None:
        raise ConfigError(
            "--tls-ca alone serves no TLS; give --tls-certificate and --tls-key too, or say --plaintext-front if only "
            "the services speak TLS"
        )
    return (replace(secure, ca=None, clients=()) if args.tls_any_client else secure), inner


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
