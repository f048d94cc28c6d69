"""One service behind the gateway: whether it is ready, what it serves, and the calls that it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bagel.deployment.gateway_config import SILENCE_S
from bagel.deployment.shared_settings import MAX_NUM_SEQS
from bagel.errors import ConfigError, TransferDamaged
from bagel.kv.lease_keeper import PeerLessor
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.integrity import WIRE_VERSION, checked_unary
from bagel.rpc.security import DIT, THINKER
from bagel.rpc.transport import Security, channel
from bagel.telemetry.logs import Log
from bagel.v1 import dit_pb2, thinker_pb2
from bagel.v1.common_pb2 import ModelInfo
from bagel_gateway.uploads import Upload

T = TypeVar("T")
CHECK_TIMEOUT_S = 5.0

log = Log("bagel_gateway.backend")


@dataclass(frozen=True)
class Address:
    """A configured service: NAME=HOST:PORT."""

    name: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read NAME=HOST:PORT; ConfigError for anything else."""
        name, _, target = text.partition("=")
        host, _, port = target.rpartition(":")
        if not (name and host and port.isdecimal()):
            raise ConfigError(f"{text!r} is no address of a service; write NAME=HOST:PORT, like dit-0=127.0.0.1:50052")
        return cls(name, target)

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


class Backend:
    """One service. model is what it serves while it is ready, else None; under_way counts the gateway's requests.

    places: the requests that it works on at once, as it said last.
    """

    kind = "service"
    role = ""
    """The name in its certificate, unless --tls-server-name gives another."""

    def __init__(
        self, address: Address, security: Security, silence_s: float = SILENCE_S, server_name: str | None = None
    ) -> None:
        self.address, self.under_way, self.places = address, 0, MAX_NUM_SEQS
        self.model: ModelInfo | None = None
        self.why_not = "not checked yet"
        self.silence_s = silence_s
        self.silent = asyncio.Event()
        """Set once it has answered no check for silence_s: its calls under way are given up."""
        self._unanswered_since: float | None = None
        self._waiting: set[Callable[[], object]] = set()
        name = server_name or self.role
        # gRPC's own error does not say which name the certificate should have.
        self._certificate = (
            f" (its certificate must be for {name!r}, see --tls-server-name)" if security.encrypted else ""
        )
        self._channel = channel(address.target, security, name)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    @property
    def name(self) -> str:
        return self.address.name

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request for the block."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    @contextmanager
    def waiting(self, give_up: Callable[[], object]) -> Iterator[None]:
        """Call give_up if it is silent, or falls silent during the block."""
        if self.silent.is_set():
            give_up()
        self._waiting.add(give_up)
        try:
            yield
        finally:
            self._waiting.discard(give_up)

    async def check(self) -> None:
        """Ask whether it is ready and what it serves."""
        began = time.monotonic()
        try:
            # A check that waited longer than silence_s would notice a silence too late.
            limit = min(CHECK_TIMEOUT_S, self.silence_s)
            reply = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=limit)
            # Any answer ends a silence, also one that says "not ready".
            self._answered()
            if reply.status != health_pb2.HealthCheckResponse.SERVING:
                self.lost("not ready: it loads or shuts down")
                return
            model = await self._describe()
        except grpc.RpcError as error:
            failed = from_rpc_error(error, self.name, inside=True)
            self.lost(str(failed), failed.hidden + self._certificate)
            # Silence counts from the start of the check, not from its timeout.
            self._unanswered_since = began if self._unanswered_since is None else self._unanswered_since
            if time.monotonic() - self._unanswered_since >= self.silence_s:
                self._fall_silent()
        except (ConfigError, TransferDamaged) as error:
            self.lost(str(error))
        else:
            self._found(model)

    def _fall_silent(self) -> None:
        self.silent.set()
        # A copy, since a call that gives up leaves the set.
        for give_up in tuple(self._waiting):
            give_up()

    def _answered(self) -> None:
        self._unanswered_since = None
        if self.silent.is_set():
            self.silent = asyncio.Event()

    def lost(self, why: str, hidden: str = "") -> None:
        """Choose it no more until a check finds it ready. Callers see why; hidden goes to the log alone."""
        if self.model is not None:
            log.warning("backend lost", backend=str(self.address), why=why, details=hidden)
        elif why != self.why_not:
            log.info("backend not ready", backend=str(self.address), why=why, details=hidden)
        self.model, self.why_not = None, why

    async def close(self) -> None:
        """Give its connection up."""
        await self._channel.close()

    async def _describe(self) -> ModelInfo:
        raise NotImplementedError

    async def _asked(self, path: str, request: Message, read: Callable[[bytes], T]) -> T:
        """The answer to a call of one message, whole."""
        return await checked_unary(self._channel, path, request, read, peer=self.name, timeout=CHECK_TIMEOUT_S)

    def _check_version(self, theirs: int) -> None:
        """Refuse a service that would drop, or read otherwise, what a request asks for."""
        if theirs != WIRE_VERSION:
            version = theirs or "1 (it does not say)"
            raise ConfigError(
                f"{self.name} speaks version {version} of the services' protocol, this gateway {WIRE_VERSION}; run the "
                "same release of both"
            )

    def _tells_places(self, max_num_seqs: int) -> None:
        # A release that does not say is taken to have the default.
        self.places = max_num_seqs or MAX_NUM_SEQS

    def _found(self, model: ModelInfo) -> None:
        if self.model is None:
            fingerprint = model.kv_fingerprint.hex()
            log.info(
                "backend ready",
                backend=str(self.address),
                model=model.name,
                kv_fingerprint=fingerprint,
                max_num_seqs=self.places,
            )
        self.model = model


class ThinkerBackend(Backend):
    """A Thinker. source: the name under which DiTs know it; page_version: the rule of its pages; lessor: of its
    store."""

    kind, role = "Thinker", THINKER

    def __init__(
        self, address: Address, security: Security, silence_s: float = SILENCE_S, server_name: str | None = None
    ) -> None:
        super().__init__(address, security, silence_s, server_name)
        self.source, self.page_version = address.name, 0
        self.build = Upload[thinker_pb2.BuildContextResponse](
            self._channel,
            "/bagel.v1.ThinkerService/BuildContext",
            thinker_pb2.BuildContextResponse.FromString,
            address.name,
            silence_s,
        )
        self.lessor = PeerLessor(address.name, self._channel)

    async def close(self) -> None:
        """Give its connection up, once all leases are given back."""
        await self.lessor.close()
        await super().close()

    async def _describe(self) -> ModelInfo:
        request, read = (
            thinker_pb2.ThinkerServiceDescribeRequest(),
            thinker_pb2.ThinkerServiceDescribeResponse.FromString,
        )
        reply = await self._asked("/bagel.v1.ThinkerService/Describe", request, read)
        self._check_version(reply.wire_version)
        self.source, self.page_version = reply.name or self.address.name, reply.page_version
        self._tells_places(reply.max_num_seqs)
        return reply.model


class DitBackend(Backend):
    """A DiT. sources: names of the Thinkers that it can pull from; page_version: the rule of the pages it reads.

    receives_kv: whether the pipeline has it draw from a Thinker's K/V; else it serves whole requests.
    """

    kind, role = "DiT", DIT

    def __init__(
        self,
        address: Address,
        security: Security,
        silence_s: float = SILENCE_S,
        server_name: str | None = None,
        *,
        receives_kv: bool,
    ) -> None:
        super().__init__(address, security, silence_s, server_name)
        self.sources, self.page_version = frozenset[str](), 0
        self.generate = Upload[dit_pb2.DitServiceGenerateResponse](
            self._channel,
            "/bagel.v1.DitService/Generate",
            dit_pb2.DitServiceGenerateResponse.FromString,
            address.name,
            silence_s,
        )
        self._receives_kv = receives_kv

    async def _describe(self) -> ModelInfo:
        request, read = dit_pb2.DitServiceDescribeRequest(), dit_pb2.DitServiceDescribeResponse.FromString
        reply = await self._asked("/bagel.v1.DitService/Describe", request, read)
        self._check_version(reply.wire_version)
        if reply.single_stage == self._receives_kv:
            change = "start it without --single-stage" if self._receives_kv else "start it with --single-stage"
            raise ConfigError(f"{self.name} does not fit the gateway's pipeline; {change}")
        self.sources, self.page_version = frozenset(reply.sources), reply.page_version
        self._tells_places(reply.max_num_seqs)
        return reply.model
