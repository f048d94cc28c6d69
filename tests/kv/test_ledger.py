"""What the protocol's state machines have found in a store's books, each as the shortest story that shows it."""

from __future__ import annotations

import pytest

from bagel.errors import StoreFull
from bagel.kv.store import KvStore
from tests.kv.protocol.books import DIGESTS, LAYOUT, LENGTHS, audit, segment_of
from tests.kv.protocol.interleaving import InterleavingLoop

A, B, C, D = DIGESTS
BLOCK = 64
E, F, G = (bytes((letter,)) * 16 for letter in b"efg")


def store_of(blocks: int) -> KvStore:
    return KvStore(LAYOUT, b"tests", blocks * BLOCK)


def cached(store: KvStore, digest: bytes, length: int) -> None:
    """A complete segment without a lease."""
    lease = store.lease([(digest, length)], 9)
    for layer in range(LAYOUT.layers):
        for begin, end in LAYOUT.page_ranges(length):
            store.write_page(digest, layer, begin, memoryview(bytes(LAYOUT.layer_bytes(end - begin))))
    store.release([lease])


def test_room_is_counted_in_blocks_as_it_is_taken() -> None:
    """48 and 96 bytes of cache take three blocks, which 144 bytes fill."""
    store = store_of(3)
    cached(store, A, LENGTHS[A])
    cached(store, B, LENGTHS[B])
    store.lease([(D, 4)], 9)
    audit(store)
    assert segment_of(store, A) is segment_of(store, B) is None


def test_a_lease_that_does_not_fit_in_one_piece_evicts_nothing_and_wakes_nobody() -> None:
    store, loop = store_of(6), InterleavingLoop()
    for digest in (A, E, F, G):
        store.lease([(digest, 1)], 9, digest.hex())
    cached(store, C, 2)
    store.release([A.hex(), F.hex()])  # holes of one block at 0 and 2, cache of two at the end
    waiting = [
        loop.start(store.lease_in_time([(bytes((n,)) * 16, 1), (bytes((n + 1,)) * 16, 3)], 9, wait_s=5)) for n in (1, 3)
    ]
    loop.settle()  # without end, were each woken by the other's failure
    assert segment_of(store, C) and not any(task.done() for task in waiting)
    with pytest.raises(StoreFull):
        store.lease([(B, 1), (D, 3)], 9)
    assert segment_of(store, C)
    for task in waiting:
        task.cancel()
    loop.settle()
    loop.close()


def test_a_claim_that_is_given_back_late_is_nobody_elses() -> None:
    store = store_of(3)
    lease = store.lease([(A, 1)], 9)
    late = store.claim(A)
    cached(store, A, 1)  # as far as the late writer knows, it still fills it
    store.release([lease])
    store.lease([(B, 2), (C, 1)], 9)  # evicts it
    assert segment_of(store, A) is None
    store.release(list(store._ledger.leases))
    store.lease([(A, 1)], 9)
    claim = store.claim(A)
    assert late and claim
    store.unclaim(late)
    assert store.claim(A) is None


def test_one_pin_of_two_segments_of_a_digest_frees_neither_for_the_other() -> None:
    store = store_of(3)
    store.lease([(A, 1)], 9, "one")
    first = store.pin(A)
    store.fail(A, StoreFull("lost"))
    store.extend("one", [(A, 1)])
    second = store.pin(A)
    store.unpin(second)
    assert first.pins == 1 and first in store._ledger._orphans
    store.unpin(first)
    audit(store)
