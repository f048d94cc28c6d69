"""Fetching contexts from the peers that hold them: each page once, each checked, nothing held afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import grpc.aio

from bagel.errors import (
    BagelError,
    ConfigError,
    ContextRefused,
    ForeignContext,
    IncompleteContext,
    SourceUnavailable,
)
from bagel.freed_memory import reuse_freed_memory
from bagel.kv.codec import DTYPES, PAGE_VERSION, Page, decode_page, version_misfit
from bagel.kv.held import HeldContexts
from bagel.kv.pages import PageKey
from bagel.kv.segment import Claim
from bagel.kv.source import Source
from bagel.kv.store import KvStore
from bagel.telemetry.logs import Log
from bagel.telemetry.tracing import span
from bagel.v1 import kv_pb2

RECONNECT_S = 0.25
"""Seconds before a broken stream is pulled again: a call made at once can go out on the breaking connection."""

WAITING_SHARE = 4
"""Signs of life that a source is asked for in one page timeout: some may be late, and one is enough."""

log = Log("bagel.kv")


@dataclass
class _Wanted:
    """Pages that a pull still waits for, with the cause where one came damaged."""

    ends: dict[PageKey, int]
    causes: dict[PageKey | None, str] = field(default_factory=dict)

    def note(self, key: PageKey | None, cause: str) -> None:
        """A page was damaged. key: None if it is unknown, as when the page names one that is not wanted."""
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
    store keeps; keeps_sources: renew the sources' leases and give them back, unless another does.
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
        keeps_sources: bool = True,
    ) -> None:
        reuse_freed_memory()
        self.store, self.keeps_sources = store, keeps_sources
        self.page_timeout_s, self.room_wait_s, self.lease_ttl_s = page_timeout_s, room_wait_s, lease_ttl_s
        self.heads = (head_begin, head_begin + store.layout.kv_heads)
        self.sources = {name: Source(name, channel) for name, channel in sources.items()}
        self._fetches: set[_Fetch] = set()

    @asynccontextmanager
    async def hold(
        self, refs: Iterable[kv_pb2.ContextRef], *, room_wait_s: float | None = None, here: bool = True
    ) -> AsyncIterator[HeldContexts]:
        """Keep contexts: their sources' leases from now on until they are fetched, the local one until the end.

        here: False if only others fetch them (`HeldContexts.elsewhere`), for whom the sources' leases are kept.
        Raises ConfigError for an unknown source, ForeignContext for another fingerprint, InvalidRequest for what is
        larger than the store, StoreFull if there is no room within room_wait_s (not given: the puller's own).
        """
        held = HeldContexts(self, list(refs), here=here)
        try:
            await held.open(self.room_wait_s if room_wait_s is None else room_wait_s)
            yield held
        finally:
            held.close()

    async def close(self) -> None:
        """Wait until all leases are given back."""
        await asyncio.gather(*(source.lessor.close() for source in self.sources.values()))

    def check(self, ref: kv_pb2.ContextRef) -> None:
        """Refuse a context that cannot be fetched from here; ConfigError or ForeignContext."""
        if ref.source not in self.sources:
            known = ", ".join(sorted(self.sources)) or "none"
            raise ConfigError(f"K/V source {ref.source!r} is not configured; the sources here are: {known}")
        if misfit := version_misfit(ref.page_version):
            raise ForeignContext(f"{ref.source} sends {misfit}")
        if ref.fingerprint != self.store.fingerprint:
            raise ForeignContext(
                f"{ref.source} offers K/V of fingerprint {ref.fingerprint.hex()}, those here have "
                f"{self.store.fingerprint.hex()}; run both with the same checkpoint and K/V type"
            )

    async def fetch(self, ref: kv_pb2.ContextRef) -> None:
        """Make all segments of a context complete; the caller holds leases on both sides."""
        fetch = _Fetch(ref.source, {segment.digest: segment.length for segment in ref.segments})
        self._fetches.add(fetch)
        try:
            # In rounds, since another fetch that has claimed a segment may give it up.
            while fetch.waiting:
                if fetch.failed is not None:
                    raise fetch.failed
                if mine := self._claim(fetch.waiting):
                    with self._claimed(ref.source, mine):
                        await self._pull(ref, {digest: fetch.waiting[digest] for digest in mine})
                for digest in list(fetch.waiting):
                    if not await self.store.wait_segment(digest):
                        break  # the fetch that filled it gave up: claim it
                    del fetch.waiting[digest]
        finally:
            self._fetches.discard(fetch)

    def _claim(self, digests: Iterable[bytes]) -> dict[bytes, Claim]:
        """Those that this pull is to fill; none is left claimed if one of them has failed for another request."""
        mine: dict[bytes, Claim] = {}
        try:
            for digest in digests:
                if claim := self.store.claim(digest):
                    mine[digest] = claim
        except BagelError:
            for claim in mine.values():
                self.store.unclaim(claim)
            raise
        return mine

    @contextmanager
    def _claimed(self, source: str, claims: Mapping[bytes, Claim]) -> Iterator[None]:
        """Gives claims back when the pull ends: a fetch that waits may claim them and go on from the pages there are.

        A pull that was cancelled or refused says nothing about the context: another request goes on with its own lease.
        Any other failure is the source's: fetches that wait for the same segments from it fail too, others go on.
        """
        try:
            yield
        except ContextRefused:
            raise
        except BagelError as error:
            for fetch in self._fetches:
                if fetch.source == source and not fetch.waiting.keys().isdisjoint(claims):
                    fetch.failed = error
            raise
        finally:
            for claim in claims.values():
                self.store.unclaim(claim)

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
        pull = span("kv pull", source=ref.source, segments=len(lengths), pages=pages, bytes=nbytes)
        with self.store.counters.pulling(), pull:
            try:
                await self._receive(ref, wanted)
            except SourceUnavailable as error:
                log.warning("stream broke", source=ref.source, missing_pages=len(wanted.ends), **error.for_log())
                await asyncio.sleep(RECONNECT_S)
            if wanted.ends:
                self.store.counters.count(retried_pages=len(wanted.ends))
                await self._receive(ref, wanted)
        if wanted.ends:
            key = next(iter(wanted.ends))
            raise IncompleteContext(
                f"K/V of segment {key.digest.hex()}, layer {key.layer}, token {key.token_begin} did not arrive from "
                f"{ref.source}: {wanted.cause(key)}, asked for twice"
            )

    async def _receive(self, ref: kv_pb2.ContextRef, wanted: _Wanted) -> None:
        """One Pull of what is wanted; stores good pages and strikes them off."""
        pull = self.sources[ref.source].pull(self._request(ref, wanted.ends), self.page_timeout_s)
        # Closed when the last page is there, which cancels the call at once and not at a later collection.
        async with aclosing(pull) as messages:
            async for data in messages:
                self._accept(data, wanted)
                if not wanted.ends:
                    return

    def _accept(self, data: bytes, wanted: _Wanted) -> None:
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
