"""`KvBlocksService`: gives the K/V of a store to peers."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from bagel.errors import ForeignContext, InvalidRequest
from bagel.freed_memory import reuse_freed_memory
from bagel.kv.codec import Parts, encode_page, encode_waiting, version_misfit
from bagel.kv.pages import PageKey
from bagel.kv.segment import ReadyPage
from bagel.kv.source import SERVICE
from bagel.kv.store import KvStore
from bagel.rpc.errors import streaming, unary
from bagel.v1 import kv_pb2

SHORTEST_WAITING_S = 0.05
"""Fewest seconds between two signs of life, whatever a puller asks for."""
Context = grpc.aio.ServicerContext[Any, Any]


class KvBlocksServicer:
    """Serves one store; register it with `add_kv_blocks`. Leases are the holder's clients' to renew and release."""

    def __init__(self, store: KvStore) -> None:
        self.store = store

    @streaming
    async def Pull(self, request: kv_pb2.PullRequest, context: Context) -> AsyncIterator[bytes]:
        """Serialized `PullResponse` messages, page by page as the pages become ready, signs of life between."""
        with self.store.counters.pulling():
            async with aclosing(self._pages(request)) as pages:
                async for page in pages:
                    yield page

    @unary
    async def Renew(self, request: kv_pb2.RenewRequest, context: Context) -> kv_pb2.RenewResponse:
        """Keeps leases alive; says which had run out."""
        return kv_pb2.RenewResponse(lapsed_lease_ids=self.store.renew(request.lease_ids))

    @unary
    async def Release(self, request: kv_pb2.ReleaseRequest, context: Context) -> kv_pb2.ReleaseResponse:
        """Gives leases back."""
        self.store.release(request.lease_ids)
        return kv_pb2.ReleaseResponse()

    @unary
    async def GetStats(self, request: kv_pb2.GetStatsRequest, context: Context) -> kv_pb2.GetStatsResponse:
        """Counters of the store."""
        return kv_pb2.GetStatsResponse(**self.store.stats().as_dict())

    async def _pages(self, request: kv_pb2.PullRequest) -> AsyncGenerator[bytes, None]:
        if misfit := version_misfit(request.page_version):
            raise ForeignContext(f"the puller reads {misfit}")
        self._check_fingerprint(request.fingerprint)
        self.store.check_lease(request.lease_id)
        layout = self.store.layout
        layers = range(*_interval("layer", request.layer_begin, request.layer_end, layout.layers))
        heads = _interval("head", request.head_begin, request.head_end, layout.kv_heads)
        wanted = [key for digest in request.digests for key in self.store.page_keys(digest, layers)]
        wanted += [PageKey(ref.digest, ref.layer, ref.token_begin) for ref in request.pages]
        sign_s = max(request.waiting_seconds, SHORTEST_WAITING_S) if request.waiting_seconds > 0 else math.inf
        async with aclosing(self.store.pages(wanted, request.lease_id, sign_s)) as pages:
            async for page in pages:
                yield encode_waiting(page) if isinstance(page, int) else self._encode(page, heads)

    def _check_fingerprint(self, fingerprint: bytes) -> None:
        own = self.store.fingerprint
        if fingerprint != own:
            raise ForeignContext(
                f"the K/V here have fingerprint {own.hex()}, the puller has {fingerprint.hex()}; "
                "run both with the same checkpoint and K/V type"
            )

    def _encode(self, page: ReadyPage, heads: tuple[int, int]) -> bytes:
        layout = self.store.layout
        payload: Parts = (page.k, page.v)
        if heads != (0, layout.kv_heads):
            payload = tuple(_pick_heads(part, heads, layout.kv_heads, layout.row_bytes) for part in (page.k, page.v))
        self.store.counters.count(sent_pages=1, sent_bytes=sum(len(part) for part in payload))
        return encode_page(page.key, page.token_end, heads, layout.head_dim, layout.dtype, payload)


def _pick_heads(rows: memoryview, heads: tuple[int, int], count: int, row_bytes: int) -> bytes:
    """Some heads of all rows [token, head, head dim]."""
    # Imported here, as only pulls of some heads need it.
    import numpy as np

    return np.frombuffer(rows, dtype=np.uint8).reshape(-1, count, row_bytes // count)[:, slice(*heads)].tobytes()


def _interval(name: str, begin: int, end: int, count: int) -> tuple[int, int]:
    """(begin, end), where an end of 0 is all. Raises InvalidRequest outside of `count`."""
    end = end or count
    if not 0 <= begin < end <= count:
        raise InvalidRequest(f"{name}_end", f"{name}s {begin} to {end} are not within 0 to {count}")
    return begin, end


def add_kv_blocks(servicer: KvBlocksServicer, server: grpc.aio.Server) -> None:
    """Register the service; Pull with bytes as they are, so that no payload goes through protobuf."""
    # glibc would give the memory of each page back to the kernel otherwise, and have it cleared again.
    reuse_freed_memory()
    handlers: dict[str, Any] = {
        "Pull": grpc.unary_stream_rpc_method_handler(
            servicer.Pull, request_deserializer=kv_pb2.PullRequest.FromString, response_serializer=None
        )
    }
    for name in ("Renew", "Release", "GetStats"):
        handlers[name] = grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=getattr(kv_pb2, f"{name}Request").FromString,
            response_serializer=getattr(kv_pb2, f"{name}Response").SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
