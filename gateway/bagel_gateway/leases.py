"""Leases of contexts that are built and that no DiT has taken over yet."""

from __future__ import annotations

import asyncio
import secrets

import grpc

from bagel.telemetry.logs import Log, request_metadata
from bagel.v1 import kv_pb2
from bagel_gateway.backends import ThinkerBackend

CALL_TIMEOUT_S = 5.0
IDLE_S = 0.2
SHORTEST_S = 0.02

log = Log("bagel_gateway.leases")


class Leases:
    """The leases of one request: while a think text is written, its companions' would run out."""

    def __init__(self, thinker: ThinkerBackend) -> None:
        self._thinker = thinker
        self._asked: set[str] = set()
        self._held: dict[str, float] = {}

    def new(self) -> str:
        """A name for a lease to be asked for: it is given back even if no answer comes."""
        name = secrets.token_hex(8)
        self._asked.add(name)
        return name

    def hold(self, ref: kv_pb2.ContextRef) -> None:
        """A context that has been told of."""
        if ref.lease_id in self._asked:
            self._held[ref.lease_id] = ref.lease_seconds

    def handed_over(self) -> None:
        """The DiT keeps them from now on, and gives them back."""
        self._held.clear()
        self._asked.clear()

    async def renew(self) -> None:
        """Renew what is held until cancelled. What goes wrong shows when the DiT pulls."""
        while True:
            await asyncio.sleep(self._pause())
            if self._held:
                await self._renew_once()

    def release(self) -> None:
        """Give back what is held, in the background: a request that failed does not wait."""
        if self._asked:
            self._thinker.in_background(self._release(sorted(self._asked)))
            self._held.clear()
            self._asked.clear()

    def _pause(self) -> float:
        """A third of the shortest lease."""
        return max(SHORTEST_S, min(self._held.values()) / 3) if self._held else IDLE_S

    async def _renew_once(self) -> None:
        request = kv_pb2.RenewRequest(lease_ids=list(self._held))
        try:
            await self._thinker.kv.Renew(request, timeout=CALL_TIMEOUT_S, metadata=request_metadata())
        except grpc.RpcError as error:
            log.warning("leases not renewed", thinker=self._thinker.name, code=str(error.code()))

    async def _release(self, lease_ids: list[str]) -> None:
        request = kv_pb2.ReleaseRequest(lease_ids=lease_ids)
        try:
            await self._thinker.kv.Release(request, timeout=CALL_TIMEOUT_S, metadata=request_metadata())
        except grpc.RpcError as error:
            log.info("leases not released; they lapse", thinker=self._thinker.name, code=str(error.code()))
