"""Which request computes, and which request exports, each segment, so that no two do the same work."""

from __future__ import annotations

import time
from collections import OrderedDict

from bagel.engine.segments import Chain
from bagel.errors import BagelError, UnknownSegment
from bagel.kv.segment import Claim
from bagel.kv.store import KvStore
from bagel_thinker.vllm.jobs import Filling, Job, Request
from bagel_thinker.vllm.sink import Notice

KNOWN_SEGMENTS = 65_536
"""Digests of computed segments to remember, so that requests which share them need not wait for one another."""


class Claims:
    """Segments that a request is computing or exporting. All but `mark` is for the engine's thread alone."""

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._busy: dict[bytes, Request] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._busy)

    def blocks(self, chain: Chain) -> bool:
        """Whether another request is still at work on a segment of this chain."""
        return any(segment.digest in self._busy for segment in chain.segments)

    def take(self, name: str, job: Job) -> Request:
        """Make a job's request, with the segments that it has to compute and export."""
        segments = job.chain.segments
        claims = {each.digest: self._claim(each.digest) for each in segments}
        fillings = {digest: Filling(digest, claim) for digest, claim in claims.items() if claim}
        fresh = frozenset(each.digest for each in segments) - self._known.keys()
        request = job.request = Request(name, job, fresh, fillings)
        self._busy.update(dict.fromkeys(fresh | fillings.keys(), request))
        return request

    def computed(self, request: Request) -> None:
        """A request's prompt is computed: others that wait for its segments find them in vLLM's cache."""
        for digest in request.fresh:
            self._known[digest] = None
            if digest not in request.fillings:  # else it stays busy until it is exported
                self._busy.pop(digest, None)
        request.fresh = frozenset()
        while len(self._known) > KNOWN_SEGMENTS:
            self._known.popitem(last=False)

    def exported(self, request: Request, marks: int) -> None:
        """Let others go on with the segments that a request has computed and exported in full."""
        for digest, filling in request.fillings.items():
            if len(filling.written) == marks and digest not in request.fresh:
                self._busy.pop(digest, None)

    def mark(self, request: Request | None, notice: Notice, ranks: int) -> BagelError | None:
        """Mark a layer of a segment as written once every rank has written its heads; returns the store's error."""
        filling = request.fillings.get(bytes.fromhex(notice.digest)) if request else None
        if request is None or filling is None:
            return None
        filling.written.add((notice.layer, notice.rank))
        if any((notice.layer, rank) not in filling.written for rank in range(ranks)):
            return None
        if (job := request.job) is not None:
            job.reading.layer_times.setdefault(filling.digest, []).append(time.monotonic())
        try:
            self._store.mark_layer(filling.digest, notice.layer)
        except UnknownSegment as gone:
            return gone
        return None

    def release(self, request: Request) -> None:
        """Give back everything that a request claimed."""
        for digest in (*request.fresh, *request.fillings):
            if self._busy.get(digest) is request:
                del self._busy[digest]
        for filling in request.fillings.values():
            self._store.unclaim(filling.claim)
            self._store.unpin(filling.claim.segment)

    def forget(self) -> None:
        """Forget which segments are computed, since vLLM's cache was dropped."""
        self._known.clear()

    def _claim(self, digest: bytes) -> Claim | None:
        """Claim and pin a segment if a lease has reserved it and no other request has filled it."""
        try:
            if claim := self._store.claim(digest):
                self._store.pin(digest)
        except UnknownSegment:
            return None
        return claim
