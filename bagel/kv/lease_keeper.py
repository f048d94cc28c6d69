"""Keeping leases on K/V alive until their holder is done with them. No torch here."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import grpc

from bagel.telemetry.logs import Log, request_metadata
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub

if TYPE_CHECKING:  # the gateway, which has no store, keeps leases too
    from bagel.kv.store import KvStore

CALL_TIMEOUT_S = 5.0
"""Most seconds of a Renew or Release; a peer that is gone forgets its leases by itself."""
IDLE_S = 0.2
"""Seconds between two looks while no lease is held."""
SHORTEST_S = 0.02
"""Fewest seconds between two renewals, however short the leases are."""

log = Log("bagel.kv.leases")


class Lessor(Protocol):
    """A store that grants leases. name: what logs call it."""

    name: str

    async def renew(self, lease_ids: Sequence[str]) -> Sequence[str]:
        """Start the time of leases anew; those that had run out."""
        ...

    def release(self, lease_ids: Sequence[str]) -> None:
        """Give leases back, without waiting for it."""
        ...


class LocalLessor:
    """The store of this process."""

    name = "this service"

    def __init__(self, store: KvStore) -> None:
        self._store = store

    async def renew(self, lease_ids: Sequence[str]) -> Sequence[str]:
        """Start the time of leases anew; those that had run out."""
        return self._store.renew(lease_ids)

    def release(self, lease_ids: Sequence[str]) -> None:
        """Give leases back."""
        self._store.release(lease_ids)


class PeerLessor:
    """The store of a peer. What goes wrong here is logged, and shows when the K/V are pulled."""

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self.name, self._stub = name, KvBlocksServiceStub(channel)
        self._background: set[asyncio.Task[None]] = set()

    async def renew(self, lease_ids: Sequence[str]) -> Sequence[str]:
        """Start the time of leases anew; those that had run out."""
        request = kv_pb2.RenewRequest(lease_ids=lease_ids)
        try:
            reply = await self._stub.Renew(request, timeout=CALL_TIMEOUT_S, metadata=request_metadata())
        except grpc.RpcError as error:
            # They stay held, so the next round asks again.
            log.warning("leases not renewed", lessor=self.name, code=str(error.code()))
            return ()
        return reply.lapsed_lease_ids

    def release(self, lease_ids: Sequence[str]) -> None:
        """Give leases back in the background: a request that failed or was cancelled does not wait for it."""
        task = asyncio.create_task(self._release(lease_ids))
        # The event loop keeps no strong reference to a task.
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Wait until all leases are given back."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _release(self, lease_ids: Sequence[str]) -> None:
        request = kv_pb2.ReleaseRequest(lease_ids=lease_ids)
        try:
            await self._stub.Release(request, timeout=CALL_TIMEOUT_S, metadata=request_metadata())
        except grpc.RpcError as error:
            log.info("leases not released; they lapse", lessor=self.name, code=str(error.code()))


class LeaseKeeper:
    """The leases that one request has at one lessor, renewed until they are released or handed over."""

    def __init__(self, lessor: Lessor) -> None:
        self._lessor = lessor
        self._named: set[str] = set()
        self._held: dict[str, float] = {}  # seconds by id

    def new(self) -> str:
        """A name for a lease to be asked for: `release` gives it back even if no answer comes."""
        name = secrets.token_hex(8)
        self._named.add(name)
        return name

    def hold(self, lease_id: str, seconds: float) -> None:
        """Renew a lease that was named by `new` and is granted; nothing for one that was handed over or released."""
        if lease_id in self._named:
            self._held[lease_id] = seconds

    def add(self, lease_id: str, seconds: float) -> None:
        """Renew a lease that was granted to somebody else, or without a name of its own."""
        self._named.add(lease_id)
        self._held[lease_id] = seconds

    def hand_over(self) -> None:
        """Another holder renews the leases from now on, and releases them."""
        self._named.clear()
        self._held.clear()

    def release(self, *lease_ids: str) -> None:
        """Give some leases back, or all. Only leases that this keeper still has are released."""
        if released := sorted(self._named.intersection(lease_ids) if lease_ids else self._named):
            self._named.difference_update(released)
            self._held = {lease_id: seconds for lease_id, seconds in self._held.items() if lease_id in self._named}
            self._lessor.release(released)

    async def renew(self) -> None:
        """Renew what is held until cancelled, three times in the shortest lease. One that has run out stays so."""
        while True:
            # A third of the time, so that one late or lost renewal does not end a lease.
            await asyncio.sleep(max(SHORTEST_S, min(self._held.values()) / 3) if self._held else IDLE_S)
            for lease_id in await self._lessor.renew(list(self._held)) if self._held else ():
                log.warning("a lease ran out before it was renewed", lessor=self._lessor.name, lease=lease_id)
                self._held.pop(lease_id, None)
