"""The services behind the gateway: which of them are ready, what they serve, and which one takes a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from bagel.deployment.gateway_config import SILENCE_S
from bagel.errors import ForeignContext, NoBackend
from bagel.pipelines import PipelineConfig, StageConfig, StageExecutionType
from bagel.rpc.transport import PLAINTEXT, Security
from bagel.telemetry.logs import Log
from bagel.v1.common_pb2 import ModelInfo
from bagel_gateway.backend import Address, Backend, DitBackend, ThinkerBackend

CHECK_EVERY_S = 1.0
LOOK_AGAIN_S = 0.05

T = TypeVar("T")
B = TypeVar("B", bound=Backend)

log = Log("bagel_gateway.backends")


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
