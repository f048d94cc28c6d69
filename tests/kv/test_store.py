"""The K/V store: leases, single flight, eviction, and memory that another process reads."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import sys
import threading
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from bagel.errors import ConfigError, IncompleteContext, InvalidRequest, LeaseLapsed, NotFinite, StoreFull
from bagel.errors import UnknownSegment as Unknown
from bagel.kv.arena import ALIGNMENT, Arena
from bagel.kv.codec import decode_page, encode_page
from bagel.kv.first_fit import FirstFit
from bagel.kv.pages import PAGE_BYTES, KvLayout, PageKey
from bagel.kv.segment import Claim
from bagel.kv.store import KvStore
from bagel.v1 import kv_pb2
from tests.kv.pair import has

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")
A, B, C, D = (bytes((letter,)) * 16 for letter in b"abcd")
LENGTH = 4
SIZE = LAYOUT.segment_bytes(LENGTH)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def store_of(segments: int, clock: Clock | None = None) -> KvStore:
    return KvStore(LAYOUT, b"tests", segments * SIZE, clock=clock or Clock())


def rows(value: float) -> torch.Tensor:
    return torch.full((LENGTH, 2, 8), float(value))


def fill(store: KvStore, digest: bytes, layers: int = 2) -> Claim:
    claim = store.claim(digest)
    assert claim
    for layer in range(layers):
        store.write_layer(digest, layer, rows(layer + 1), rows(-layer - 1))
    return claim


def cached(store: KvStore, *digests: bytes) -> None:
    """Complete segments without leases."""
    for digest in digests:
        lease = store.lease([(digest, LENGTH)], 9)
        fill(store, digest)
        store.release([lease])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_of_the_real_model_fit_and_cover_a_segment(dtype: str) -> None:
    layout = KvLayout(layers=28, kv_heads=4, head_dim=128, dtype=dtype)
    ranges = layout.page_ranges(4900)
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == 4900
    assert all(layout.layer_bytes(end - begin) <= PAGE_BYTES for begin, end in ranges)
    assert layout.layer_bytes(ranges[0][1]) == PAGE_BYTES <= 2 << 20
    assert KvLayout(28, 1, 128, dtype, page_heads=4).page_ranges(4900) == ranges
    assert [layout.page_end(4900, begin) for begin, _ in ranges] == [end for _, end in ranges]
    assert layout.page_end(4900, 1) is layout.page_end(4900, 4900) is None


@pytest.mark.parametrize("bad", [{"dtype": "int8"}, {"layers": 0}, {"head_dim": 1 << 20}])
def test_a_layout_that_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        KvLayout(**{"layers": 2, "kv_heads": 2, "head_dim": 8, "dtype": "float32", **bad})


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 5)), max_size=40))
def test_blocks_never_overlap_and_memory_comes_back(steps: list[tuple[int, int]]) -> None:
    allocator, blocks = FirstFit(64 * ALIGNMENT, ALIGNMENT), dict[int, int]()
    for nbytes, victim in steps:
        begin = allocator.allocate(nbytes)
        if begin is not None:
            assert begin % ALIGNMENT == 0 and begin + nbytes <= 64 * ALIGNMENT
            assert all(begin + nbytes <= b or b + n <= begin for b, n in blocks.items())
            blocks[begin] = nbytes
        if victim < len(blocks):
            begin = list(blocks)[victim]
            allocator.free(begin, blocks.pop(begin))
    for begin, nbytes in blocks.items():
        allocator.free(begin, nbytes)
    assert allocator.unused == 64 * ALIGNMENT and allocator.allocate(64 * ALIGNMENT) == 0


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 60))
def test_what_fits_can_be_allocated(sizes: list[int], size: int) -> None:
    allocator = FirstFit(size)
    fits = allocator.fits(*sizes)
    assert allocator.unused == size  # asking takes nothing
    assert fits == (None not in [allocator.allocate(each) for each in sizes])


def _read_and_write(name: str, nbytes: int, offset: int, answer: Any) -> None:
    arena = Arena.attach(name, nbytes)
    answer.send(bytes(arena.slice(offset, 4)))
    arena.slice(offset, 4)[:] = b"back"
    answer.send(b"")


def test_another_process_reads_and_writes_the_store() -> None:
    store = store_of(1)
    store.lease([(A, LENGTH)], 9)
    fill(store, A)
    offset = store.offsets(A, 1)[1]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)

    def read() -> tuple[bytes, bytes]:
        return receiver.recv(), receiver.recv()

    child = context.Process(
        target=_read_and_write, args=(store.arena.name, store.arena.nbytes, offset, sender), daemon=True
    )
    child.start()
    assert receiver.poll(60)  # its start imports torch
    assert read()[0] == rows(-2)[0, 0, :1].numpy().tobytes()
    child.join(20)
    assert bytes(store.arena.slice(offset, 4)) == b"back"
    receiver.close()
    sender.close()


def test_a_segment_is_claimed_once_and_complete_after_its_last_layer() -> None:
    store = store_of(2)
    store.lease([(A, LENGTH)], 9)
    fill(store, A, layers=1)
    assert not store.claim(A) and not store.is_complete(A)
    assert store.ready_pages(A) == [(0, 0)]
    with pytest.raises(IncompleteContext):
        store.load(A)
    store.write_layer(A, 1, rows(2), rows(-2))
    k, v = store.load(A)
    assert torch.equal(k, torch.stack((rows(1), rows(2)))) and torch.equal(v, -k)
    assert not store.claim(A) and store.ready_pages(A) == [(0, 0), (1, 0)]
    store.lease([(A, LENGTH), (A, LENGTH)], 9)
    stats = store.stats()
    assert (stats.computed_segments, stats.computed_bytes, stats.reused_segments) == (1, SIZE, 1)
    assert (stats.held_bytes, stats.stored_bytes, stats.capacity_bytes, stats.leases) == (SIZE, SIZE, 2 * SIZE, 2)


def test_eviction_takes_the_least_recently_used_and_never_what_is_leased() -> None:
    store = store_of(3)
    cached(store, A, B)
    lease = store.lease([(A, LENGTH)], 9)
    cached(store, C)
    store.release([lease])  # A was used last
    store.lease([(B, LENGTH)], 9)
    store.lease([(D, LENGTH)], 9)
    assert [has(store, digest) for digest in (A, B, C, D)] == [True, True, False, True]
    store.lease([(A, LENGTH)], 9)
    with pytest.raises(StoreFull, match="--kv-store-bytes"):
        store.lease([(A, LENGTH), (C, LENGTH)], 9)
    assert store.stats().leases == 3 and store.stats().held_bytes == 3 * SIZE


def test_a_lease_that_does_not_fit_evicts_and_holds_nothing() -> None:
    store = store_of(3)
    store.lease([(A, LENGTH)], 9)
    cached(store, B, C)
    with pytest.raises(StoreFull):
        store.lease([(D, 3 * LENGTH)], 9)
    assert store.is_complete(B) and store.is_complete(C) and not has(store, D)
    assert store.stats().held_bytes == SIZE


def test_what_can_never_fit_is_refused_at_once_by_the_name_of_its_flag() -> None:
    store = KvStore(LAYOUT, b"tests", 2 * SIZE, flag="--kv-cache-bytes")

    async def wait() -> None:
        async with asyncio.timeout(1):
            await store.lease_in_time([(A, 3 * LENGTH)], 9, wait_s=60)

    with pytest.raises(InvalidRequest, match="--kv-cache-bytes"):
        asyncio.run(wait())
    lease = store.lease([(A, LENGTH)], 9)
    with pytest.raises(InvalidRequest):
        store.extend(lease, [(B, 2 * LENGTH)])
    assert store.stats().held_bytes == SIZE


def test_leases_wait_for_room_in_their_order() -> None:
    async def main() -> None:
        store = store_of(2)
        first = store.lease([(A, 2 * LENGTH)], 9)
        order: list[bytes] = []

        async def hold(digest: bytes, rows: int, lease_id: str = "") -> str:
            lease = await store.lease_in_time([(digest, rows)], 9, lease_id, wait_s=10)
            order.append(digest)
            return lease

        waits = [asyncio.create_task(hold(digest, LENGTH)) for digest in (B, C, D)]
        await asyncio.sleep(0.01)
        begun = asyncio.get_running_loop().time()
        store.release([first])
        leases = [await waits[0], await waits[1]]
        assert asyncio.get_running_loop().time() - begun < 0.2  # woken
        assert order == [B, C] and not waits[2].done()
        waits[2].cancel()
        late = asyncio.create_task(hold(D, LENGTH, "late"))
        await asyncio.sleep(0.01)
        threading.Thread(target=store.release, args=([leases[0]],)).start()
        store.release([leases[1], await late])
        assert store.stats().held_bytes == 0

    asyncio.run(main())


def test_a_lease_that_gets_no_room_says_when_to_try_again() -> None:
    clock = Clock()
    store = store_of(1, clock)
    store.lease([(A, LENGTH)], 9)

    async def wait(seconds: float) -> str:
        return await store.lease_in_time([(B, LENGTH)], 9, "mine", wait_s=seconds)

    with pytest.raises(StoreFull, match=r"0\.1 s") as caught:
        asyncio.run(wait(0.1))
    assert caught.value.retry_after_s >= 0.1 and store.stats().leases == 1

    async def lapse() -> str:
        waits = asyncio.create_task(wait(10))
        await asyncio.sleep(0.01)
        clock.now = 10  # nobody releases the first lease: it runs out
        return await waits

    assert asyncio.run(lapse()) == "mine"


def test_leases_lapse_unless_renewed() -> None:
    clock = Clock()
    store = store_of(3, clock)
    one, other = store.lease([(A, LENGTH)], 9), store.lease([(A, LENGTH), (B, LENGTH)], 9)
    fill(store, A)
    clock.now = 8
    assert store.renew([one, "gone"]) == ["gone"]
    clock.now = 10
    assert store.renew([one, other]) == [other]
    assert store.is_complete(A) and not has(store, B)  # incomplete and without a lease
    with pytest.raises(LeaseLapsed):
        store.extend(other, [(B, LENGTH)])
    store.release([one, "gone"])
    stats = store.stats()
    assert (stats.leases, stats.held_bytes, stats.stored_bytes) == (0, 0, SIZE)


def test_a_pinned_segment_outlives_its_leases() -> None:
    store = store_of(1)
    lease = store.lease([(A, LENGTH)], 9)
    fill(store, A, layers=1)
    pinned = store.pin(A)
    store.release([lease])
    with pytest.raises(StoreFull):
        store.lease([(B, LENGTH)], 9)
    store.write_layer(A, 1, rows(2), rows(-2))
    assert store.is_complete(A)
    store.unpin(pinned)
    store.lease([(B, LENGTH)], 9)
    assert not has(store, A)


def test_what_is_being_filled_outlives_its_leases() -> None:
    """A holder that has the K/V already gives its lease back while another service computes them anew."""
    store = store_of(1)
    lease = store.lease([(A, LENGTH)], 9)
    fill(store, A, layers=1)
    store.release([lease])
    with pytest.raises(StoreFull):
        store.lease([(B, LENGTH)], 9)
    store.write_layer(A, 1, rows(2), rows(-2))
    assert store.is_complete(A)
    again = store.lease([(B, LENGTH)], 9)  # a complete one is cache
    claim = fill(store, B, layers=1)
    store.release([again])
    store.unclaim(claim)
    assert not has(store, B) and store.stats().stored_bytes == 0


def test_waiters_get_the_segment_the_claim_or_the_error() -> None:
    async def main() -> None:
        store = KvStore(LAYOUT, b"tests", 3 * SIZE)
        lease = store.lease([(A, LENGTH), (B, LENGTH)], 9)
        claim = store.claim(B)
        assert claim and store.claim(A)
        whole, given_up = asyncio.create_task(store.wait_segment(A)), asyncio.create_task(store.wait_segment(B))
        await asyncio.sleep(0.01)
        store.unclaim(claim)
        assert await given_up is False

        def write() -> None:
            for layer in (1, 0):
                store.write_layer(A, layer, rows(layer), rows(layer))

        writer = threading.Thread(target=write)
        writer.start()
        assert await whole is True and torch.equal(store.load(A)[0][1], rows(1))
        writer.join()
        assert store.claim(B)
        waits = asyncio.create_task(store.wait_segment(B))
        await asyncio.sleep(0.01)
        store.fail(B, NotFinite("overflow"))
        with pytest.raises(NotFinite):
            await waits
        with pytest.raises(NotFinite):  # a lease wants it: who asks late hears what those heard who waited
            store.claim(B)
        store.extend(lease, [(B, LENGTH)])
        fill(store, B)
        store.release([lease])
        assert store.stats().held_bytes == 0 and store.stats().stored_bytes == 2 * SIZE

    asyncio.run(main())


def test_what_does_not_fit_the_layout_is_refused() -> None:
    store = store_of(2)
    store.lease([(A, LENGTH)], 9)
    with pytest.raises(InvalidRequest, match="rows"):
        store.lease([(A, LENGTH + 1)], 9)
    with pytest.raises(InvalidRequest, match="16 bytes"):
        store.lease([(b"short", LENGTH)], 9)
    with pytest.raises(ValueError, match="float64"):
        store.write_layer(A, 0, rows(1).double(), rows(1).double())
    with pytest.raises(IncompleteContext, match="bytes"):
        store.write_page(A, 0, 0, memoryview(b"short"))
    with pytest.raises(IncompleteContext, match="token 1"):
        store.write_page(A, 0, 1, memoryview(b""))
    with pytest.raises(Unknown):
        store.write_layer(B, 0, rows(1), rows(1))


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_the_codec_agrees_with_protobuf(digest: bytes, number: int, payload: bytes) -> None:
    key = PageKey(digest, number, number // 2)
    data = encode_page(key, number, (1, 3), 128, "bfloat16", (payload, payload))
    message = kv_pb2.PullResponse.FromString(data)
    assert (message.digest, message.layer, message.token_begin) == key and message.payload == 2 * payload
    assert (message.dtype, message.head_begin, message.head_end) == (kv_pb2.KV_DTYPE_BFLOAT16, 1, 3)
    assert not payload or message.SerializeToString() == data
    page = decode_page(data)
    assert page is not None
    assert (page.key, page.token_end, page.heads, page.head_dim) == (key, number, (1, 3), 128)
    assert page.payload == 2 * payload and page.payload.obj is data
    assert page.checksum == message.checksum == page.found_checksum()


@given(st.binary(max_size=60))
def test_other_bytes_are_no_page(data: bytes) -> None:
    try:
        expected = kv_pb2.PullResponse.FromString(data)
    except DecodeError:
        with pytest.raises(IncompleteContext, match="not readable"):
            decode_page(data)
    else:
        life = kv_pb2.PullResponse(waiting=kv_pb2.Waiting(pages=expected.waiting.pages)).SerializeToString()
        if data == life:
            assert decode_page(data) is None
        else:
            with pytest.raises(IncompleteContext, match="neither a page nor a sign of life"):
                decode_page(data)


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_memory_that_is_mapped_waits_for_the_kernel_at_no_page() -> None:
    arena, piece = Arena(32 << 20), bytes(1 << 20)

    def faults_of_writing(begin: int, end: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for at in range(begin, end, len(piece)):
            arena.slice(at, len(piece))[:] = piece
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = (8 << 20) // resource.getpagesize()
    assert faults_of_writing(0, 8 << 20) >= pages
    assert arena.map_now()
    assert faults_of_writing(8 << 20, 16 << 20) < pages / 10


def test_shared_memory_that_the_machine_does_not_give_is_told_in_one_line() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ConfigError, match=r"1048576 bytes of shared memory cannot be had: File too large"):
            Arena(1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
