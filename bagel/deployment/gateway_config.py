"""The configuration of the gateway. A new setting of it is one field here and one line of docs. No torch here."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bagel.deployment.http_front import HttpFront
from bagel.deployment.settings import setting
from bagel.deployment.shared_settings import (
    BATCH_TIMEOUT_S,
    SERVICE,
    TOPOLOGIES,
    WIRED,
    Calling,
    Listening,
    ReadingImages,
    listen_at,
)
from bagel.errors import ConfigError, InvalidRequest
from bagel.rpc.limits import MAX_MESSAGE_BYTES, MAX_UNREAD_CALL_BYTES

MAX_BYTES_IN_FLIGHT = 192 * 2**20
"""Three of the largest bodies and messages; what the gateway then takes in all is in docs/operate.md."""
BACKEND_TIMEOUT_S = 15.0
"""Longer than a runner that died takes to come back with a small model."""
SILENCE_S = 15.0
MAX_IMAGES = 7
"""As many as questions of MMMU have. At the model's full size their tokens may be more than it has positions for, which
the stage that reads them refuses."""
MOST_IMAGES = 8
"""What the setting may be: as many files as a form may have."""
PICTURE_SETTINGS = ("full", "no-prompt", "none")
KEYS_FILE = "BAGEL_API_KEYS_FILE"
"""The environment's variable that names the file of API keys."""


def default_keys() -> Path | None:
    """The file of API keys that the environment names; ConfigError for a variable that is set to nothing.

    That is no way to say "none": it is what a misspelt variable in a start script comes to, and would let anyone in.
    """
    named = os.environ.get(KEYS_FILE)
    if named is not None and not named.strip():
        raise ConfigError(f"{KEYS_FILE} is set but empty; let it name the file of API keys, or unset it")
    return None if named is None else Path(named)


@dataclass(frozen=True, kw_only=True)
class GatewayConfig(HttpFront, ReadingImages, Calling, Listening):
    """Everything that a gateway is started with."""

    MODULE: ClassVar = "bagel_gateway"
    ABOUT: ClassVar = "Takes requests, sends them through the stages."

    listen: str = listen_at("127.0.0.1:50051")
    pipeline: str = setting(
        "the topology", default="bagel", choices=TOPOLOGIES, elsewhere="the pipeline of the deploy file"
    )
    thinkers: tuple[str, ...] = setting(
        "a Thinker; may be repeated",
        default=(), flag="--thinker", metavar="NAME=HOST:PORT", shape=SERVICE, elsewhere=WIRED,
    )  # fmt: skip
    dits: tuple[str, ...] = setting(
        "a DiT; may be repeated",
        default=(), flag="--dit", metavar="NAME=HOST:PORT", shape=SERVICE, elsewhere=WIRED,
    )  # fmt: skip
    max_requests: int | None = setting(
        "requests under way at once, and as many that wait (default: as many as the stages say that they have places)",
        default=None, metavar="N", at_least=1,
    )  # fmt: skip
    batch_timeout_s: float = setting(
        "seconds to wait for a place", default=BATCH_TIMEOUT_S, metavar="S", at_least=0, everywhere=True
    )
    silence_timeout_s: float = setting(
        "of a service, then its calls are ended", default=SILENCE_S, metavar="S", at_least=0
    )
    backend_timeout_s: float = setting(
        "to wait for a ready service", default=BACKEND_TIMEOUT_S, metavar="S", at_least=0
    )
    tls_any_client: bool = setting(
        "callers need no certificate; --tls-ca is for the services alone", default=False, elsewhere=WIRED
    )
    plaintext_services: bool = setting(
        "TLS is for callers alone: the services are on this machine", default=False, elsewhere=WIRED
    )
    plaintext_front: bool = setting(
        "TLS is for the services alone, as behind a proxy that speaks it", default=False, elsewhere=WIRED
    )
    sampling_defaults: dict[str, Any] = setting(
        "defaults for what requests leave open",
        default_factory=dict, metavar="JSON", elsewhere="the default_sampling_params of the deploy file's stages",
    )  # fmt: skip
    max_unread_bytes_per_call: int = setting(
        "of one answer that waits for its client", default=MAX_UNREAD_CALL_BYTES, metavar="N", at_least=1
    )
    max_bytes_in_flight: int = setting(
        "of all requests together, gRPC and HTTP; more are refused as busy", default=MAX_BYTES_IN_FLIGHT, metavar="N"
    )
    max_images: int = setting(
        "input images of one request", default=MAX_IMAGES, metavar="N", at_least=1, at_most=MOST_IMAGES
    )
    max_image_pixels: int = setting("of one request's images together", default=4 * 64_000_000, metavar="N", at_least=1)
    picture_settings: str = setting(
        "what the file of a picture says of its making: all, no texts, or nothing",
        default="full", choices=PICTURE_SETTINGS,
    )  # fmt: skip
    api_keys: Path | None = setting(
        f"callers need one of them (default: {KEYS_FILE}'s, else none)", default_factory=default_keys, metavar="FILE"
    )
    log_stats: bool = setting("log where the time of each request went", default=False)

    def check(self) -> None:
        """Raise ConfigError for services, bounds and defaults that do not fit to each other or to the pipeline."""
        super().check()
        self._check_services()
        largest = max(self.max_body_bytes, MAX_MESSAGE_BYTES)
        if self.max_bytes_in_flight < largest:
            raise ConfigError(
                f"--max-bytes-in-flight is {self.max_bytes_in_flight}; it must be at least {largest}, one request's"
            )
        self._check_defaults()

    def _check_services(self) -> None:
        from bagel.pipelines import pipeline  # not for --help: it loads Pillow

        has_thinker = any(stage.model_stage == "thinker" for stage in pipeline(self.pipeline).stages)
        if self.thinkers and not has_thinker:
            raise ConfigError(f"{self.pipeline} has no Thinker; leave --thinker out")
        if has_thinker and not self.thinkers:
            raise ConfigError(f"{self.pipeline} needs a Thinker; give --thinker thinker-0=HOST:PORT")
        if not self.dits:
            raise ConfigError("there is no DiT; give --dit dit-0=HOST:PORT")
        names = Counter(service.partition("=")[0] for service in (*self.thinkers, *self.dits))
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise ConfigError(f"two services are called {twice[0]}; give each its own name")

    def _check_defaults(self) -> None:
        from bagel.prompts import TextPart
        from bagel.request import Modality, resolve

        for modality in Modality:
            try:
                resolve(modality, (TextPart("checked"),), {}, self.sampling_defaults)
            except InvalidRequest as error:
                raise ConfigError(f"--sampling-defaults: {error}") from None
