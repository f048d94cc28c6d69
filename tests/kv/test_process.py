"""A source in a process of its own that stops, goes on and is killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import grpc.aio
import pytest
import torch

from bagel.errors import BagelError, KvTimeout, SourceUnavailable
from bagel.kv.codec import PAGE_VERSION
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.service import KvBlocksServicer, add_kv_blocks
from bagel.kv.store import KvStore
from bagel.v1 import kv_pb2

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=64, dtype="float32")
DIGEST, LENGTH, FINGERPRINT = b"s" * 16, 10, b"tests"
TIMEOUT_S = 0.5


def _serve(pipe: Connection) -> None:
    asyncio.run(_serve_store(pipe))


async def _serve_store(pipe: Connection) -> None:
    """A store with the first of two layers; answers every question with a new lease."""
    store = KvStore(LAYOUT, FINGERPRINT, 1 << 20)
    lease = store.lease([(DIGEST, LENGTH)], 60)
    store.claim(DIGEST)
    store.write_layer(DIGEST, 0, *torch.ones(2, LENGTH, 2, 64))
    server = grpc.aio.server()
    add_kv_blocks(KvBlocksServicer(store), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send((port, lease))
    while await asyncio.to_thread(pipe.recv):
        pipe.send(store.lease([(DIGEST, LENGTH)], 60))


def test_a_process_that_stops_and_one_that_is_killed_are_told_apart() -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs,), daemon=True)
    child.start()
    try:
        assert pipe.poll(30)
        asyncio.run(_ends(child.pid or 0, pipe))
    finally:
        child.kill()
        child.join()
        pipe.close()
        theirs.close()


async def _ends(pid: int, pipe: Connection) -> None:
    port, lease = pipe.recv()
    store = KvStore(LAYOUT, FINGERPRINT, 1 << 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        puller = KvPuller(store, {"thinker": channel}, page_timeout_s=TIMEOUT_S)
        await _ends_with(KvTimeout, puller, lease, pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
        pipe.send(True)
        patient = KvPuller(store, {"thinker": channel})
        await _ends_with(SourceUnavailable, patient, pipe.recv(), pid, signal.SIGKILL)
        await puller.close()
        await patient.close()


async def _ends_with(kind: type[BagelError], puller: KvPuller, lease: str, pid: int, number: int) -> None:
    """Sends the process a signal once the first layer has come; asserts how the fetch ends, and that it ends soon."""
    ref = kv_pb2.ContextRef(
        segments=[kv_pb2.SegmentRef(digest=DIGEST, length=LENGTH)],
        source="thinker",
        lease_id=lease,
        lease_seconds=60,
        fingerprint=FINGERPRINT,
        page_version=PAGE_VERSION,
    )
    store = puller.store
    received = store.stats().received_pages

    async def fetch() -> None:
        async with puller.hold([ref]) as held:
            await held.fetch()

    task = asyncio.create_task(fetch())
    while store.stats().received_pages == received:
        await asyncio.sleep(0.01)
    os.kill(pid, number)
    start = time.monotonic()
    with pytest.raises(kind, match="thinker"):
        await task
    assert time.monotonic() - start < TIMEOUT_S + 2
    stats = store.stats()
    assert (stats.leases, stats.pulls, stats.held_bytes, stats.stored_bytes) == (0, 0, 0, 0)
