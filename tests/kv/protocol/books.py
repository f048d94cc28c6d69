"""What must be true of a store's books at every moment, whatever was done to it. Looks behind the store's methods."""

from __future__ import annotations

from dataclasses import dataclass

from bagel.kv.pages import KvLayout
from bagel.kv.segment import Segment
from bagel.kv.store import KvStore


@dataclass(frozen=True)
class SmallPages(KvLayout):
    """Pages of two tokens, so that short segments have several."""

    @property
    def page_tokens(self) -> int:
        return 2


LAYOUT = SmallPages(layers=2, kv_heads=1, head_dim=3, dtype="float32")
"""48 bytes a token: most segments do not end where the next block of memory may begin."""
LENGTHS = {bytes((letter,)) * 16: length for letter, length in zip(b"abcd", (1, 2, 3, 4), strict=True)}
DIGESTS = list(LENGTHS)
PAGES = {
    digest: [(layer, begin) for layer in range(LAYOUT.layers) for begin, _ in LAYOUT.page_ranges(length)]
    for digest, length in LENGTHS.items()
}


def content(digest: bytes, layer: int, begin: int) -> bytes:
    """The right bytes of a page, which no other page has."""
    length = (LAYOUT.page_end(LENGTHS[digest], begin) or begin) - begin
    return bytes((digest[0] ^ 16 * layer ^ begin,)) * LAYOUT.layer_bytes(length)


def audit(store: KvStore) -> None:
    """bytes-accounted, leases-counted, claims-open, orphans-pinned: asserts them."""
    told = store.stats()  # which drops the leases that have run out
    ledger = store._ledger
    stored, orphans = list(ledger.segments.values()), list(ledger._orphans)
    holes = list(ledger._allocator._free)
    blocks = sorted(holes + [(each.offset, ledger._allocator.aligned(each.nbytes)) for each in stored + orphans])
    at = 0
    for begin, nbytes in blocks:
        assert begin == at, f"bytes-accounted: byte {at} belongs to nobody or to two: {blocks}"
        at += nbytes
    assert at == ledger.capacity_bytes, f"bytes-accounted: {at} of {ledger.capacity_bytes}"
    for segment in stored:
        leases = sum(lease.segments.get(segment.digest) is segment for lease in ledger.leases.values())
        assert segment.leases == leases, f"leases-counted: {segment} is in {leases} leases"
        assert segment.stored and segment.error is None and segment.pins >= 0, segment
        assert not (segment.complete and segment.claimed), f"claims-open: {segment} is complete and claimed"
        assert segment.complete or not segment.idle, f"nothing-forgotten: nobody fills or wants {segment}"
    for segment in orphans:
        assert segment.pins and not segment.stored and not segment.claimed, f"orphans-pinned: {segment}"
    held = sum(segment.nbytes for segment in stored if segment.leases)
    assert (told.stored_bytes, told.held_bytes) == (sum(each.nbytes for each in stored), held), "bytes-accounted"


def fits(store: KvStore, digests: list[bytes]) -> bool:
    """Whether there is room for segments once everything is evicted that nobody uses."""
    ledger = store._ledger
    trial = ledger._allocator.copy()
    for segment in ledger.segments.values():
        if segment.idle and segment.digest not in digests:
            trial.free(segment.offset, segment.nbytes)
    new = [digest for digest in dict.fromkeys(digests) if digest not in ledger.segments]
    return trial.fits(*(LAYOUT.segment_bytes(LENGTHS[digest]) for digest in new))


def segment_of(store: KvStore, digest: bytes) -> Segment | None:
    return store._ledger.segments.get(digest)


def bytes_of(store: KvStore, segment: Segment, page: tuple[int, int]) -> bytes:
    """What lies in the memory of a page."""
    found = store._page(segment, *page)
    return bytes(found.k) + bytes(found.v)
