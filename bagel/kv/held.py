"""The contexts of one request in a store: fetched, and kept under leases until the request is done with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from bagel.errors import LeaseLapsed
from bagel.kv.lease_keeper import LeaseKeeper, LocalLessor
from bagel.v1 import kv_pb2

if TYPE_CHECKING:  # which makes them
    from bagel.kv.puller import KvPuller


class HeldContexts:
    """Contexts of one request, made by `KvPuller.hold`. lease_id: the lease in the local store."""

    def __init__(self, puller: KvPuller, refs: Sequence[kv_pb2.ContextRef], *, here: bool = True) -> None:
        self._puller, self._refs, self._here = puller, refs, here
        self._unfetched = list(range(len(refs)))
        self._own = LeaseKeeper(LocalLessor(puller.store))
        self._at_sources: dict[str, LeaseKeeper] = {}
        self._renewing: list[asyncio.Task[None]] = []
        self.lease_id = ""
        self.elsewhere: list[Callable[[], Awaitable[None]]] = []
        """Fetches of the same contexts into other stores: started with this one, under the same leases of sources."""

    async def fetch(self) -> None:
        """Make all segments of the contexts complete in the store, and elsewhere; gives the sources' leases back.

        Raises IncompleteContext, KvTimeout, SourceUnavailable, ContextRefused or StoreFull.
        """
        self.check()
        self._puller.store.extend(self.lease_id, self._segments())  # what failed for another request meanwhile
        others = [asyncio.ensure_future(fetch()) for fetch in self.elsewhere]
        tasks = [*others, *(asyncio.create_task(self._fetch(index, others)) for index in self._unfetched)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.check()

    def check(self) -> None:
        """Raises LeaseLapsed unless the local lease has run without a break since `hold`.

        While it has, what was fetched lies where it was: check this after a copy of it is made, before it is used.
        A lease that ran out is never taken up again, as its room may have been another request's meanwhile.
        """
        try:
            self._puller.store.check_lease(self.lease_id)
        except LeaseLapsed:
            raise LeaseLapsed(
                f"the lease on the K/V that were fetched ran out here: it was not renewed for "
                f"{self._puller.lease_ttl_s:g} s, as when a service is stopped or gets no CPU; send the request again"
            ) from None

    async def open(self, room_wait_s: float) -> None:
        """Take all leases. Raises as `KvPuller.hold`."""
        puller = self._puller
        for ref in self._refs if puller.keeps_sources else ():
            if source := puller.sources.get(ref.source):
                self._at_sources.setdefault(ref.source, LeaseKeeper(source.lessor)).add(ref.lease_id, ref.lease_seconds)
        self._renewing = [asyncio.create_task(keeper.renew()) for keeper in self._at_sources.values()]
        # The sources' leases are renewed from here on, as room in the local store may be long in coming.
        for ref in self._refs:  # only now, so that `close` gives all leases back
            puller.check(ref)
        ttl_s = puller.lease_ttl_s
        self.lease_id = await puller.store.lease_in_time(self._segments(), ttl_s, wait_s=room_wait_s)
        self._own.add(self.lease_id, ttl_s)
        self._renewing.append(asyncio.create_task(self._own.renew()))

    def close(self) -> None:
        """Give all leases back."""
        for task in self._renewing:
            task.cancel()
        for keeper in (self._own, *self._at_sources.values()):
            keeper.release()

    async def _fetch(self, index: int, others: Sequence[asyncio.Future[None]]) -> None:
        ref = self._refs[index]
        if self._here:
            await self._puller.fetch(ref)
        if others:  # the source keeps what they fetch too; `fetch` raises their errors
            await asyncio.wait(others)
        self._unfetched.remove(index)
        # Contexts may share a lease, which goes back with the last of them.
        last = all(_lease(self._refs[other]) != _lease(ref) for other in self._unfetched)
        if last and (keeper := self._at_sources.get(ref.source)) is not None:
            keeper.release(ref.lease_id)

    def _segments(self) -> list[tuple[bytes, int]]:
        """What is held here: digest and K/V rows of each segment."""
        if not self._here:
            return []
        return [(segment.digest, segment.length) for ref in self._refs for segment in ref.segments]


def _lease(ref: kv_pb2.ContextRef) -> tuple[str, str]:
    return ref.source, ref.lease_id
