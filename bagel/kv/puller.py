"""Fetching contexts from the peers that hold them: each page once, each checked, nothing held afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from bagel.errors import (
    BagelError,
    ConfigError,
    ContextRefused,
    ForeignContext,
    IncompleteContext,
    KvTimeout,
    LeaseLapsed,
    Loading,
    SourceUnavailable,
)
from bagel.kv.codec import DTYPES, PAGE_VERSION, Page, decode_page, version_misfit
from bagel.kv.memory import reuse_freed_memory
from bagel.kv.pages import PageKey
from bagel.kv.service import SERVICE
from bagel.kv.store import KvStore
from bagel.rpc.errors import from_rpc_error
from bagel.telemetry.logs import Log, request_metadata
from bagel.telemetry.tracing import span
from bagel.v1 import kv_pb2
from bagel.v1.kv_pb2_grpc import KvBlocksServiceStub

CALL_TIMEOUT_S = 5.0
"""Most seconds of a Renew or Release; a source that is gone forgets its leases by itself."""

RECONNECT_S = 0.25
"""Before a broken stream is pulled again: a call made at once can go out on the connection that is just breaking."""

WAITING_SHARE = 4
"""Signs of life that a source is asked for in one page timeout: some may be late, and one is enough."""

LOST = ("UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED")
"""Statuses that a transport ends a stream with: the last one for a message length that was damaged on its way.

Only this side's task cancels without a status.
"""
DETAILS = "grpc-status-details-bin"

log = Log("bagel.kv")


@dataclass
class _Wanted:
    """Pages that a pull still waits for, with the cause where one came damaged."""

    ends: dict[PageKey, int]
    causes: dict[PageKey | None, str] = field(default_factory=dict)

    def note(self, key: PageKey | None, cause: str) -> None:
        """A page was damaged; the key is None if it cannot be told which, as when nobody wants the one it names."""
        self.causes[key if key in self.ends else None] = cause

    def cause(self, key: PageKey) -> str:
        """Why a page is not there."""
        return self.causes.get(key) or self.causes.get(None) or "it was not sent"


@dataclass(eq=False)
class _Fetch:
    """A context on its way. waiting: its segments, with their lengths, that are not complete.

    failed: what its source has failed with for another request that filled one of them.
    """

    source: str
    waiting: dict[bytes, int]
    failed: BagelError | None = None


class KvPuller:
    """Brings contexts into a store from `sources`, channels by the names of configured peers.

    page_timeout_s: longest silence of a source before a pull fails. One whose pages are queued or being computed says
    so meanwhile, however long it takes; room_wait_s: longest wait for room in the store;
    lease_ttl_s: seconds of the local lease, which is renewed meanwhile; head_begin: first head of the model that this
    store keeps.
    """

    def __init__(
        self,
        store: KvStore,
        sources: Mapping[str, grpc.aio.Channel],
        *,
        page_timeout_s: float = 10.0,
        room_wait_s: float = 5.0,
        lease_ttl_s: float = 30.0,
        head_begin: int = 0,
    ) -> None:
        reuse_freed_memory()
        self.store = store
        self.page_timeout_s, self.room_wait_s, self.lease_ttl_s = page_timeout_s, room_wait_s, lease_ttl_s
        self.heads = (head_begin, head_begin + store.layout.kv_heads)
        self._stubs = {name: KvBlocksServiceStub(channel) for name, channel in sources.items()}
        # Without a deserializer: bytes that are damaged must not break the call, and protobuf would copy the payload.
        self._pulls: dict[str, Any] = {
            name: channel.unary_stream(
                f"/{SERVICE}/Pull", request_serializer=kv_pb2.PullRequest.SerializeToString, response_deserializer=None
            )
            for name, channel in sources.items()
        }
        self._background: set[asyncio.Task[None]] = set()
        self._fetches: set[_Fetch] = set()

    @asynccontextmanager
    async def hold(
        self, refs: Iterable[kv_pb2.ContextRef], *, room_wait_s: float | None = None
    ) -> AsyncIterator[HeldContexts]:
        """Keep contexts: their sources' leases from now on until they are fetched, the local one until the end.

        Raises ConfigError for an unknown source, ForeignContext for another fingerprint, InvalidRequest for what is
        larger than the store, StoreFull if there is no room within room_wait_s (not given: the puller's own).
        """
        held = HeldContexts(self, list(refs))
        try:
            await held._open(self.room_wait_s if room_wait_s is None else room_wait_s)
            yield held
        finally:
            held._close()

    async def close(self) -> None:
        """Wait until all leases are given back."""
        await asyncio.gather(*self._background)

    def _check(self, ref: kv_pb2.ContextRef) -> None:
        if ref.source not in self._stubs:
            known = ", ".join(sorted(self._stubs)) or "none"
            raise ConfigError(f"K/V source {ref.source!r} is not configured; the sources here are: {known}")
        if misfit := version_misfit(ref.page_version):
            raise ForeignContext(f"{ref.source} sends {misfit}")
        if ref.fingerprint != self.store.fingerprint:
            raise ForeignContext(
                f"{ref.source} offers K/V of fingerprint {ref.fingerprint.hex()}, those here have "
                f"{self.store.fingerprint.hex()}; run both with the same checkpoint and K/V type"
            )

    async def _fetch(self, ref: kv_pb2.ContextRef) -> None:
        """Make all segments of a context complete; the caller holds leases on both sides."""
        fetch = _Fetch(ref.source, {segment.digest: segment.length for segment in ref.segments})
        self._fetches.add(fetch)
        try:
            while fetch.waiting:
                if fetch.failed is not None:
                    raise fetch.failed
                if mine := self._claim(fetch.waiting):
                    with self._claimed(ref.source, mine):
                        await self._pull(ref, {digest: fetch.waiting[digest] for digest in mine})
                for digest in list(fetch.waiting):
                    if not await self.store.wait_segment(digest):
                        break  # who filled it gave up: claim it
                    del fetch.waiting[digest]
        finally:
            self._fetches.discard(fetch)

    def _claim(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those that this pull is to fill; none is left claimed if one of them has failed for another request."""
        mine: list[bytes] = []
        try:
            for digest in digests:
                if self.store.claim(digest):
                    mine.append(digest)
        except BagelError:
            for digest in mine:
                self.store.unclaim(digest)
            raise
        return mine

    @contextmanager
    def _claimed(self, source: str, digests: Sequence[bytes]) -> Iterator[None]:
        """What happens to claims if the pull ends early: whoever waits may claim them, and goes on from what is there.

        A pull that was cancelled or refused says nothing about the context: another request goes on with its own lease.
        Any other failure is the source's: who waits for the same from it fails too, who has another source goes on.
        """
        try:
            yield
        except ContextRefused:
            raise
        except BagelError as error:
            for fetch in self._fetches:
                if fetch.source == source and not fetch.waiting.keys().isdisjoint(digests):
                    fetch.failed = error
            raise
        finally:
            for digest in digests:
                self.store.unclaim(digest)

    async def _pull(self, ref: kv_pb2.ContextRef, lengths: Mapping[bytes, int]) -> None:
        """Fetch what is missing of segments; damaged or missing pages are asked for once more.

        A stream that breaks leaves pages missing. Silence is not asked twice: it has taken its time.
        """
        wanted = _Wanted(
            {
                PageKey(digest, layer, begin): end
                for digest, length in lengths.items()
                for begin, end in self.store.layout.page_ranges(length)
                for layer in range(self.store.layout.layers)
            }
        )
        for digest in lengths:
            for page in self.store.ready_pages(digest):  # of a pull that was cancelled
                wanted.ends.pop(PageKey(digest, *page), None)
        pages, nbytes = len(wanted.ends), sum(self.store.layout.segment_bytes(length) for length in lengths.values())
        with self.store.pulling(), span("kv pull", source=ref.source, segments=len(lengths), pages=pages, bytes=nbytes):
            try:
                await self._receive(ref, wanted)
            except SourceUnavailable as error:
                log.warning("stream broke", source=ref.source, missing_pages=len(wanted.ends), **error.for_log())
                await asyncio.sleep(RECONNECT_S)
            if wanted.ends:
                self.store.count_retried(len(wanted.ends))
                await self._receive(ref, wanted)
        if wanted.ends:
            key = next(iter(wanted.ends))
            raise IncompleteContext(
                f"K/V of segment {key.digest.hex()}, layer {key.layer}, token {key.token_begin} did not arrive from "
                f"{ref.source}: {wanted.cause(key)}, asked for twice"
            )

    async def _receive(self, ref: kv_pb2.ContextRef, wanted: _Wanted) -> None:
        """One Pull of what is wanted; stores good pages and strikes them off."""
        lengths = {segment.digest: segment.length for segment in ref.segments}
        call = self._pulls[ref.source](self._request(ref, wanted.ends), metadata=request_metadata())
        try:
            while wanted.ends:
                data = await self._read(call, ref.source)
                if data is None:
                    return
                self._accept(data, wanted, lengths)
        finally:
            call.cancel()

    async def _read(self, call: Any, source: str) -> bytes | None:
        """The next message; None at the end of the stream."""
        try:
            async with asyncio.timeout(self.page_timeout_s):
                data = await call.read()
        except TimeoutError:
            raise KvTimeout(
                f"nothing came from {source} for {self.page_timeout_s:g} s, no page of K/V and no sign of life; see "
                "whether it and the network to it are alive"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise _source_error(error, source) from error
        return None if data is grpc.aio.EOF else data

    def _accept(self, data: bytes, wanted: _Wanted, lengths: Mapping[bytes, int]) -> None:
        try:
            page = decode_page(data)
        except IncompleteContext as error:
            wanted.note(None, str(error))
            return
        if page is None:
            return  # a sign of life
        found = page.found_checksum()
        if found != page.checksum:  # in its header or its payload: its key may be another's, which stays wanted too
            wanted.note(page.key, f"its checksum is {found:016x}, not {page.checksum:016x}")
        elif page.key not in wanted.ends:
            wanted.note(None, f"a page of segment {page.key.digest.hex()}, layer {page.key.layer} came unasked")
        elif cause := self._damage(page, wanted.ends[page.key]):
            wanted.note(page.key, cause)
        else:
            self.store.write_page(*page.key, page.payload)
            del wanted.ends[page.key]

    def _damage(self, page: Page, end: int) -> str:
        """What is wrong with an intact page where the one wanted ends at `end`; empty if nothing is."""
        layout = self.store.layout
        tokens = end - page.key.token_begin
        facts = {
            "token end": (page.token_end, end),
            "heads": (page.heads, self.heads),
            "head dim": (page.head_dim, layout.head_dim),
            "type": (page.dtype, DTYPES[layout.dtype]),
            "bytes": (len(page.payload), layout.layer_bytes(tokens)),
        }
        for name, (found, right) in facts.items():
            if found != right:
                return f"its {name} is {found}, not {right}"
        return ""

    def _request(self, ref: kv_pb2.ContextRef, ends: Collection[PageKey]) -> kv_pb2.PullRequest:
        """Whole segments by digest, the rest page by page."""
        lengths = {segment.digest: segment.length for segment in ref.segments}
        keys: dict[bytes, list[PageKey]] = {}
        for key in ends:
            keys.setdefault(key.digest, []).append(key)
        layout = self.store.layout
        whole = [d for d, n in keys.items() if len(n) == layout.layers * len(layout.page_ranges(lengths[d]))]
        parts = [key for digest, each in keys.items() if digest not in whole for key in each]
        return kv_pb2.PullRequest(
            digests=whole,
            pages=[kv_pb2.PageRef(digest=d, layer=layer, token_begin=begin) for d, layer, begin in parts],
            fingerprint=self.store.fingerprint,
            lease_id=ref.lease_id,
            head_begin=self.heads[0],
            head_end=self.heads[1],
            waiting_seconds=self.page_timeout_s / WAITING_SHARE,
            page_version=PAGE_VERSION,
        )

    async def _keep(self, ref: kv_pb2.ContextRef) -> None:
        """Renew a source's lease for ever. What goes wrong shows in the pull."""
        while True:
            await asyncio.sleep(max(ref.lease_seconds / 3, 0.01))
            with suppress(grpc.aio.AioRpcError):
                request = kv_pb2.RenewRequest(lease_ids=[ref.lease_id])
                await self._stubs[ref.source].Renew(request, timeout=CALL_TIMEOUT_S)

    async def _keep_own(self, lease_id: str) -> None:
        """Renew the local lease. One that has run out stays so, and `HeldContexts.check` tells."""
        while True:
            await asyncio.sleep(self.lease_ttl_s / 3)
            if self.store.renew([lease_id]):
                log.warning("the own lease on K/V ran out: it was not renewed in time", seconds=self.lease_ttl_s)
                return

    def _release(self, ref: kv_pb2.ContextRef) -> None:
        """Give a source's lease back, in the background: a request that was cancelled does not wait."""

        async def release() -> None:
            with suppress(grpc.aio.AioRpcError):
                request = kv_pb2.ReleaseRequest(lease_ids=[ref.lease_id])
                await self._stubs[ref.source].Release(request, timeout=CALL_TIMEOUT_S)

        task = asyncio.create_task(release())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class HeldContexts:
    """Contexts of one request, made by `KvPuller.hold`. lease_id: the lease in the local store."""

    def __init__(self, puller: KvPuller, refs: Sequence[kv_pb2.ContextRef]) -> None:
        self._puller, self._refs = puller, refs
        self._unfetched = list(range(len(refs)))
        self._keepers: dict[tuple[str, str], asyncio.Task[None]] = {}  # by source and lease
        self._own: asyncio.Task[None] | None = None
        self.lease_id = ""

    async def fetch(self) -> None:
        """Make all segments of the contexts complete in the store; gives the sources' leases back.

        Raises IncompleteContext, KvTimeout, SourceUnavailable, ContextRefused or StoreFull.
        """
        self.check()
        self._puller.store.extend(self.lease_id, self._segments())  # what failed for another request meanwhile
        tasks = [asyncio.create_task(self._fetch(index)) for index in self._unfetched]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.check()

    def check(self) -> None:
        """Raises LeaseLapsed unless the local lease has run without a break since `hold`.

        While it has, what was fetched lies where it was: whoever copies it elsewhere asks this once the copy is made.
        A lease that ran out may have been another's room meanwhile, and is never taken up again.
        """
        try:
            self._puller.store.check_lease(self.lease_id)
        except LeaseLapsed:
            raise LeaseLapsed(
                f"the lease on the K/V that were fetched ran out here: it was not renewed for "
                f"{self._puller.lease_ttl_s:g} s, as when a service is stopped or gets no CPU; send the request again"
            ) from None

    async def _fetch(self, index: int) -> None:
        ref = self._refs[index]
        await self._puller._fetch(ref)
        self._unfetched.remove(index)
        if all(_lease(self._refs[other]) != _lease(ref) for other in self._unfetched):
            self._let_go(ref)

    async def _open(self, room_wait_s: float) -> None:
        puller = self._puller
        for ref in self._refs:
            if ref.source in puller._stubs and _lease(ref) not in self._keepers:
                self._keepers[_lease(ref)] = asyncio.create_task(puller._keep(ref))
        for ref in self._refs:  # only now, so that the leases of all are given back
            puller._check(ref)
        self.lease_id = await puller.store.lease_in_time(self._segments(), puller.lease_ttl_s, wait_s=room_wait_s)
        self._own = asyncio.create_task(puller._keep_own(self.lease_id))

    def _segments(self) -> list[tuple[bytes, int]]:
        return [(segment.digest, segment.length) for ref in self._refs for segment in ref.segments]

    def _let_go(self, ref: kv_pb2.ContextRef) -> None:
        """Give a source's lease back, once."""
        if keeper := self._keepers.pop(_lease(ref), None):
            keeper.cancel()
            self._puller._release(ref)

    def _close(self) -> None:
        for ref in self._refs:
            self._let_go(ref)
        if self._own is not None:
            self._own.cancel()
            self._puller.store.release([self.lease_id])


def _lease(ref: kv_pb2.ContextRef) -> tuple[str, str]:
    return ref.source, ref.lease_id


def _source_error(error: grpc.aio.AioRpcError, source: str) -> BagelError:
    """What the end of a call with a source means: what the source says, or that it cannot be reached."""
    told = any(key == DETAILS for key, _ in error.trailing_metadata() or ())
    if not told and error.code().name in LOST:
        return SourceUnavailable(
            f"the connection to {source} broke while K/V were fetched from it ({error.code().name}); the log has the "
            "details",
            hidden=str(error.details()),
        )
    cause = from_rpc_error(error, source, inside=True)
    if isinstance(cause, Loading):  # of the source, not of this service: its callers would take it for ours
        return SourceUnavailable(f"{source} was started again while K/V were fetched from it: {cause}")
    return cause
