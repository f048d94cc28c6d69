"""Groups of settings that several services have. No torch here, and no gRPC: --help reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bagel.deployment.settings import Config, setting
from bagel.rpc.limits import CONNECTIONS, DRAIN_S, MAX_UNREAD_BYTES, READER_TIMEOUT_S, Limits

BATCH_TIMEOUT_S = 5.0
MAX_NUM_SEQS = 16
KV_BYTES = 2 * 2**30
"""Shared memory for K/V, of each side."""
STEP_TIMEOUT_S = 600.0
"""Seconds of a step, or of a layer of one: far beyond any that a GPU or a CPU takes."""
DTYPES = ("auto", "bfloat16", "float32")
ENGINES = ("auto", "torch", "vllm")
ATTENTION_BACKENDS = ("auto", "fa3", "fa2", "sdpa")
QUANTIZATIONS = ("fp8",)
"""What a DiT can quantise its weights to."""
OFFLOADS = ("layers",)
"""What a DiT can keep in the host's memory."""
WORKER_BACKENDS = ("process", "ray")
TOPOLOGIES = ("bagel", "bagel_think", "bagel_single_stage")
SERVICE = (r"[^=]+=[^=]+:\d+", "NAME=HOST:PORT, like thinker-0=10.0.0.5:50052")

OF_STAGE = "a setting of a stage; write it into the deploy file of --deploy-config"
WIRED = "set by bagel serve, which starts the services and connects them"
_GRPC = "bounds of the gRPC port; none of them ends a call whose request has come in"
_LIMITS = Limits()


def listen_at(address: str) -> Any:
    """The field of the address that a service listens on."""
    return setting("port 0: any free one", default=address, metavar="HOST:PORT", elsewhere="--host and --port here")


def known_as(name: str) -> Any:
    """The field of a service's name."""
    return setting("name under which peers know this service", default=name, elsewhere=WIRED)


def allowed_callers(*roles: str) -> Any:
    """The field of the names that callers' certificates may have."""
    return setting(
        f"a name that a caller's certificate may have, with --tls-ca; may be given again (default: "
        f"{', '.join(roles) or 'any'})",
        default=None,
        flag="--tls-allow-client",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class Listening(Config):
    """Settings of every service: where it listens, with which TLS and bounds, and what it logs."""

    CALLERS: ClassVar[tuple[str, ...]] = ()
    """The names that it takes calls of where tls_allow_clients says none; empty: any of the CA's."""

    listen: str
    drain_timeout_s: float = setting(
        "for requests under way", default=DRAIN_S, metavar="S", at_least=0, everywhere=True
    )
    reader_timeout_s: float = setting(
        "of a client that takes nothing of its answer; then its call ends",
        default=READER_TIMEOUT_S, metavar="S", above=0,
    )  # fmt: skip
    max_unread_bytes: int = setting(
        "of all answers that wait for their clients", default=MAX_UNREAD_BYTES, metavar="N", at_least=1
    )
    tls_certificate: Path | None = setting("PEM; without it, plaintext", default=None, metavar="FILE")
    tls_key: Path | None = setting("PEM", default=None, metavar="FILE")
    tls_ca: Path | None = setting("PEM; peers are checked against it, clients too", default=None, metavar="FILE")
    tls_allow_clients: tuple[str, ...] | None = allowed_callers()
    grpc_connections: int | None = setting(
        f"at once; further ones are closed (default: {CONNECTIONS}, at most half of the open files allowed)",
        default=None, metavar="N", at_least=1, heading=_GRPC,
    )  # fmt: skip
    grpc_streams: int = setting(
        "calls at once on one connection; further ones wait",
        default=_LIMITS.streams, metavar="N", at_least=1, heading=_GRPC,
    )  # fmt: skip
    grpc_watches: int = setting(
        "streams of health's Watch and reflection; a quarter of one host",
        default=_LIMITS.watches, metavar="N", at_least=1, heading=_GRPC,
    )  # fmt: skip
    grpc_message_timeout_s: float = setting(
        "until a call's request has come in", default=_LIMITS.message_s, metavar="S", above=0, heading=_GRPC
    )
    grpc_handshake_timeout_s: float = setting(
        "for TLS and HTTP/2, then it is closed", default=_LIMITS.handshake_s, metavar="S", above=0, heading=_GRPC
    )
    grpc_connection_age_s: float = setting(
        "of a connection, after which its caller makes another",
        default=_LIMITS.age_s, metavar="S", above=0, heading=_GRPC,
    )  # fmt: skip
    log_level: str = setting("", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"), everywhere=True)


@dataclass(frozen=True, kw_only=True)
class Calling(Config):
    """Settings of a service that calls others."""

    tls_server_names: tuple[str, ...] = setting(
        "the name that the certificate of a service must have (default: its role, thinker or dit); may be given again, "
        "like thinker-0=a.example",
        default=(), flag="--tls-server-name", metavar="SERVICE=NAME", elsewhere=WIRED,
        shape=(r"[^=]+=.+", "SERVICE=NAME, like thinker-0=a.example"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReadingImages(Config):
    """Settings of a service that reads images."""

    image_workers: int = setting("processes that read images", default=2, metavar="N", at_least=1, everywhere=True)
    # 64 megapixels take two or three seconds.
    image_timeout_s: float = setting(
        "seconds to read one image; one that takes longer is refused",
        default=20.0,
        metavar="S",
        above=0,
        everywhere=True,
    )


@dataclass(frozen=True, kw_only=True)
class OfModel(Config):
    """Settings of a service that loads the model."""

    model: str = setting("checkpoint folder, hub name or bagel-nano", elsewhere=WIRED)
    name: str
    device: str = setting("auto, cpu, cuda or cuda:N", default="auto", elsewhere=WIRED)
    dtype: str = setting("", default="auto", choices=DTYPES, elsewhere=WIRED)
    max_num_seqs: int = setting(
        "requests worked on at once", default=MAX_NUM_SEQS, metavar="N", at_least=1, stage=True, elsewhere=OF_STAGE
    )
    batch_timeout_s: float = setting(
        "for a place among them, then busy", default=BATCH_TIMEOUT_S, metavar="S", at_least=0, everywhere=True
    )
    max_model_len: int | None = setting(
        "positions of prompt and text together",
        default=None, metavar="N", at_least=1, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
    enforce_eager: bool | None = setting(
        "no fused kernels, no CUDA graphs, no warm-up: starts faster, computes slower",
        default=None, stage=True, elsewhere=OF_STAGE,
    )  # fmt: skip
