"""The services behind the gateway: which of them are ready, what they serve, and which one takes a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bagel.deployment.gateway_config import SILENCE_S
from bagel.deployment.shared_settings import MAX_NUM_SEQS
from bagel.errors import ConfigError, ForeignContext, NoBackend, TransferDamaged
from bagel.kv.lease_keeper import PeerLessor
from bagel.pipelines import PipelineConfig, StageConfig, StageExecutionType
from bagel.rpc.errors import from_rpc_error
from bagel.rpc.integrity import WIRE_VERSION, checked_unary
from bagel.rpc.security import DIT, THINKER
from bagel.rpc.transport import PLAINTEXT, Security, channel
from bagel.telemetry.logs import Log
from bagel.v1 import dit_pb2, thinker_pb2
from bagel.v1.common_pb2 import ModelInfo
from bagel_gateway.uploads import Upload

T = TypeVar("T")
CHECK_EVERY_S = 1.0
CHECK_TIMEOUT_S = 5.0
LOOK_AGAIN_S = 0.05

log = Log("bagel_gateway.backends")


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


B = TypeVar("B", bound=Backend)


class Backends:
    """All services of a deployment.

    pipeline: what is deployed, and so which kinds of services there must be. wait_s: how long a request waits for a
    service that is ready, as one that is started again soon is. server_names: what the certificate of a service, by its
    name, must be for; its role if there is no entry.
    """

    def __init__(
        self,
        pipeline: PipelineConfig,
        thinkers: Sequence[Address],
        dits: Sequence[Address],
        *,
        security: Security = PLAINTEXT,
        check_every_s: float = CHECK_EVERY_S,
        silence_s: float = SILENCE_S,
        wait_s: float = 0.0,
        server_names: Mapping[str, str] | None = None,
    ) -> None:
        named = server_names or {}
        receives_kv = pipeline.stage("dit").omni_kv_config.need_recv_cache
        self.thinkers = [ThinkerBackend(each, security, silence_s, named.get(each.name)) for each in thinkers]
        self.dits = [
            DitBackend(each, security, silence_s, named.get(each.name), receives_kv=receives_kv) for each in dits
        ]
        self._kinds: dict[str, Sequence[Backend]] = {"thinker": self.thinkers, "dit": self.dits}
        self._stages = [self._kinds[stage.model_stage] for stage in pipeline.stages]
        self._check_every_s, self._wait_s = check_every_s, wait_s
        self._watches: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether each stage has a service that is ready."""
        return all(any(backend.model is not None for backend in stage) for stage in self._stages)

    def places(self, stages: Sequence[str]) -> int:
        """Requests that the services of these stages ("thinker", "dit") work on at once, all together.

        Those that are ready count. Of a stage that has none all do, as requests wait for one of them to come back.
        """
        return sum(each.places for stage in stages for each in _ready_of(self._kinds[stage]) or self._kinds[stage])

    def start(self, on_ready: Callable[[bool], Awaitable[None]], on_check: Callable[[], object]) -> None:
        """Check every service from now on. on_ready is called with each change of `ready`, on_check after each check,
        which may have changed `places`."""
        self._on_ready, self._on_check, self._was_ready = on_ready, on_check, False
        every = (*self.thinkers, *self.dits)
        self._watches = [asyncio.create_task(self._watch(backend), name=f"watch {backend.name}") for backend in every]

    async def close(self) -> None:
        """Check no more, and give all connections up."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for backend in (*self.thinkers, *self.dits):
            await backend.close()

    async def begin(self, path: Sequence[StageConfig]) -> Services:
        """The services for a request that goes through these stages, the least busy ones.

        Raises NoBackend if a stage has none that is ready in time, ForeignContext if no two of them fit.
        """
        return await self._in_time(lambda: self._begin(path))

    async def dit_for(self, thinker: ThinkerBackend | None, model: ModelInfo) -> DitBackend:
        """The least busy DiT for a request under way, which is planned for that model and has K/V at that Thinker.

        Raises NoBackend if none is ready in time, ForeignContext if none of them fits.
        """
        return await self._in_time(lambda: self._dit_for(thinker, model))

    def _begin(self, path: Sequence[StageConfig]) -> Services:
        if path[0].execution_type is StageExecutionType.DIFFUSION:
            first: Backend = _ready("DiT", self.dits)[0]
            thinker = None
        else:
            first = thinker = self._feeding_thinker() if len(path) > 1 else _ready("Thinker", self.thinkers)[0]
        assert first.model is not None
        return Services(self, thinker, first.model)

    def _feeding_thinker(self) -> ThinkerBackend:
        """The least busy Thinker that some DiT can draw from."""
        thinkers, dits = _ready("Thinker", self.thinkers), _ready("DiT", self.dits)
        for thinker in thinkers:
            if any(_misfit(thinker, thinker.model, dit) is None for dit in dits):
                return thinker
        # No pair fits, so the least busy one stands for all.
        raise ForeignContext(str(_misfit(thinkers[0], thinkers[0].model, dits[0])))

    def _dit_for(self, thinker: ThinkerBackend | None, model: ModelInfo) -> DitBackend:
        dits = _ready("DiT", self.dits)
        for dit in dits:
            if _misfit(thinker, model, dit) is None:
                return dit
        raise ForeignContext(str(_misfit(thinker, model, dits[0])))

    async def _in_time(self, choose: Callable[[], T]) -> T:
        """What is chosen; NoBackend if what it is chosen from is not ready in time."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return choose()
            except NoBackend:
                # Asked after the choice, so that it is tried at least once.
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _watch(self, backend: Backend) -> None:
        while True:
            try:
                await backend.check()
            except Exception:  # a bug; the watch goes on
                log.error("check failed", exc_info=True, backend=str(backend.address))
                backend.lost("its check failed; the gateway's log says how")
            self._on_check()
            if self.ready != self._was_ready:
                self._was_ready = self.ready
                log.info("gateway ready" if self._was_ready else "gateway not ready")
                await self._on_ready(self._was_ready)
            await asyncio.sleep(self._check_every_s)


@dataclass(frozen=True)
class Services:
    """The services of one request: the Thinker where it begins, if there is one, and the model that it is planned for.

    The DiT is chosen when its turn comes: while a think text is written, the one that was ready may have gone.
    """

    backends: Backends
    thinker: ThinkerBackend | None
    model: ModelInfo

    async def dit(self) -> DitBackend:
        """The least busy DiT that fits; see `Backends.dit_for`."""
        return await self.backends.dit_for(self.thinker, self.model)

    def busy(self) -> AbstractContextManager[None]:
        """Count the request at its Thinker for the block."""
        return nullcontext() if self.thinker is None else self.thinker.busy()


def _ready_of(backends: Sequence[B]) -> list[B]:
    return [backend for backend in backends if backend.model is not None]


def _ready(kind: str, backends: Sequence[B]) -> list[B]:
    """Those that are ready, the least busy first."""
    ready = _ready_of(backends)
    if not ready:
        each = "; ".join(f"{backend.name}: {backend.why_not}" for backend in backends)
        raise NoBackend(f"no {kind} is ready: {each or 'none is configured'}; start it, or try again later")
    return sorted(ready, key=lambda backend: backend.under_way)


def _misfit(thinker: ThinkerBackend | None, model: ModelInfo | None, dit: DitBackend) -> str | None:
    """Why a DiT cannot go on with what a Thinker of that model began; None if it can. No Thinker: a single stage."""
    assert model is not None and dit.model is not None
    if thinker is None:
        same = model.checkpoint_fingerprint == dit.model.checkpoint_fingerprint
        return None if same else f"{dit.name} serves another model than the request was begun with; send it again"
    if thinker.page_version != dit.page_version:
        return (
            f"{thinker.name} and {dit.name} do not share K/V: they write and read pages by rule "
            f"{thinker.page_version or 1} and {dit.page_version or 1}; run the same release of both"
        )
    ours, theirs = model.kv_fingerprint, dit.model.kv_fingerprint
    if ours != theirs:
        return (
            f"{thinker.name} and {dit.name} do not share K/V: their fingerprints are {ours.hex()} and "
            f"{theirs.hex()}; start both with the same model and dtype"
        )
    if thinker.source not in dit.sources:
        known = ", ".join(sorted(dit.sources)) or "none"
        return f"{dit.name} knows no source {thinker.source!r} (it knows {known}); start it with --source"
    return None
