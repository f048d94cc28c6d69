"""The K/V benchmark: pull a context over loopback, and compare with a raw socket that moves the same bytes.

Each sender is a process of its own, and the CPU-seconds are those of both ends. Our side checks the pages; the control
checks nothing.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median, quantiles
from threading import Thread
from typing import Any

import grpc
import grpc.aio
import torch

from bagel.kv.codec import PAGE_VERSION
from bagel.kv.pages import KvLayout
from bagel.kv.puller import KvPuller
from bagel.kv.service import KvBlocksServicer, add_kv_blocks
from bagel.kv.store import KvStore
from bagel.rpc.transport import CHANNEL_OPTIONS, SERVER_OPTIONS
from bagel.v1 import kv_pb2
from bench.report import Table
from bench.timing import Sample

LAYOUT = KvLayout(layers=28, kv_heads=4, head_dim=128, dtype="bfloat16")
LENGTH = 2048
"""Tokens of the context, which has 112 MiB of K/V in the full-size model's layout."""
DIGESTS, FINGERPRINT = (b"a" * 16, b"b" * 16), b"bench"
NBYTES = LAYOUT.segment_bytes(LENGTH)
CHUNK = 2 << 20
LIMIT = 5.0
"""The most CPU-seconds per byte that a pull may take, as a multiple of the control's."""
NOTE = f"{NBYTES >> 20} MiB at a time; medians; CPU-seconds of both ends, their ratio with quartiles; limit {LIMIT:g}"


class Child:
    """A sender in a process of its own. `port`: the port on which it listens; `ask`: puts a question to it."""

    def __init__(self, target: Callable[[Connection], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs,), daemon=True)
        self._process.start()
        self.port: int = self._pipe.recv()

    def ask(self, question: object) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    @contextmanager
    def measure(self, into: list[Sample]) -> Iterator[None]:
        """Add the time that the block takes, here and in the child."""
        theirs, mine, start = self.ask("cpu"), time.process_time(), time.perf_counter()
        yield
        wall, mine = time.perf_counter() - start, time.process_time() - mine
        into.append(Sample(wall, mine + self.ask("cpu") - theirs))


def run(repeats: int = 15) -> Iterator[Table]:
    """Measure pulls and transfers of the control in turn, after one warm-up of each; yields one table."""
    with Child(_serve) as server, Child(_send) as sender:
        pulls, control = asyncio.run(_transfers(server, sender, repeats))
    table = Table("pull", NOTE)
    low, ratio, high = quantiles((ours.cpu / raw.cpu for ours, raw in zip(pulls, control, strict=True)), n=4)
    for name, samples, times in (
        ("Pull, pages checked", pulls, f"{ratio:.2f} ({low:.2f} to {high:.2f})"),
        ("raw socket, unchecked", control, "1"),
    ):
        wall, cpu = (median(getattr(sample, each) for sample in samples) for each in ("wall", "cpu"))
        gb = NBYTES / 1e9
        table.add(case=name, gb_per_s=gb / wall, cpu_s_per_gb=cpu / gb, cpu_ratio=times, samples=len(samples))
    table.failed = ratio > LIMIT
    yield table


async def _transfers(server: Child, sender: Child, repeats: int) -> tuple[list[Sample], list[Sample]]:
    pulls: list[Sample] = []
    control: list[Sample] = []
    store = KvStore(LAYOUT, FINGERPRINT, NBYTES)  # room for one context, so that each pull replaces the last one
    buffer = memoryview(bytearray(NBYTES))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=CHANNEL_OPTIONS) as channel:
        puller = KvPuller(store, {"server": channel})
        with socket.create_connection(("127.0.0.1", sender.port)) as connection:
            for turn in range(repeats + 1):
                digest = DIGESTS[turn % 2]  # alternating, since the store would not pull the same one again
                ref = kv_pb2.ContextRef(
                    segments=[kv_pb2.SegmentRef(digest=digest, length=LENGTH)],
                    source="server",
                    lease_id=server.ask(digest),
                    lease_seconds=60,
                    fingerprint=FINGERPRINT,
                    page_version=PAGE_VERSION,
                )
                with server.measure(pulls):
                    await _pull(puller, ref)
                with sender.measure(control):
                    _receive(connection, buffer)
        await puller.close()
    return pulls[1:], control[1:]


async def _pull(puller: KvPuller, ref: kv_pb2.ContextRef) -> None:
    async with puller.hold([ref]) as held:
        await held.fetch()


def _receive(connection: socket.socket, buffer: memoryview) -> None:
    connection.sendall(b"?")
    at = 0
    while at < len(buffer):
        at += connection.recv_into(buffer[at : at + CHUNK])


def _serve(pipe: Connection) -> None:
    asyncio.run(_serve_store(pipe))


async def _serve_store(pipe: Connection) -> None:
    store = KvStore(LAYOUT, FINGERPRINT, 2 * NBYTES)
    for digest in DIGESTS:
        store.lease([(digest, LENGTH)], 3600)
        store.claim(digest)
        rows = torch.randn(2, LENGTH, LAYOUT.kv_heads, LAYOUT.head_dim).bfloat16()
        for layer in range(LAYOUT.layers):
            store.write_layer(digest, layer, *rows)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_kv_blocks(KvBlocksServicer(store), server)
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    while True:
        question = await asyncio.to_thread(pipe.recv)
        pipe.send(time.process_time() if question == "cpu" else store.lease([(question, LENGTH)], 60))


def _send(pipe: Connection) -> None:
    """Send NBYTES for every byte received."""
    payload = memoryview(os.urandom(NBYTES))
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        connection, _ = server.accept()
    Thread(target=_answer, args=(pipe,), daemon=True).start()
    while connection.recv(1):
        for at in range(0, NBYTES, CHUNK):
            connection.sendall(payload[at : at + CHUNK])


def _answer(pipe: Connection) -> None:
    while pipe.recv():
        pipe.send(time.process_time())


if __name__ == "__main__":
    for each in run():
        print(each.render())
