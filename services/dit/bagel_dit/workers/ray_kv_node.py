"""The server's end of the actor that pulls K/V on another node of a Ray cluster (`ray_pages.py`)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError

from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import LoadPages
from bagel.errors import RunnerDied
from bagel.kv.pages import KvLayout
from bagel.prompts import BranchName
from bagel.telemetry.logs import current_request
from bagel.v1 import kv_pb2
from bagel_dit.workers import SharedMemory
from bagel_dit.workers.ray_cluster import Node
from bagel_dit.workers.ray_remote import RemoteRank, answer


class RayKvNode:
    """A KvNode: the actor that pulls K/V there, and the ranks that it is for. heads: K/V heads that they need."""

    def __init__(self, node: Node, actor: Any, ranks: Sequence[RemoteRank], heads: tuple[int, int]) -> None:
        self.node, self.actor, self._ranks, self._heads = node, actor, ranks, heads

    async def memory(self) -> SharedMemory:
        """The memory that the ranks there attach."""
        memory: SharedMemory = await self.ask(self.actor.memory.remote(self._heads))
        return memory

    async def serve(self, config: DitConfig, layout: KvLayout, fingerprint: bytes, *, pinned: bool) -> None:
        """Let it get ready to pull K/V of this layout, the whole model's. pinned: whether ranks pinned its memory."""
        await self.ask(self.actor.serve.remote(config, layout, fingerprint, pinned=pinned))

    async def stats(self) -> Mapping[str, int]:
        """Counters of its store, by their names in GetStatsResponse."""
        found: Mapping[str, int] = await self.ask(self.actor.stats.remote())
        return found

    @asynccontextmanager
    async def hold(
        self, refs: Sequence[kv_pb2.ContextRef], room_wait_s: float | None
    ) -> AsyncIterator[RayHeldContexts]:
        """As KvNode has it."""
        key = secrets.token_hex(8)
        sent = [ref.SerializeToString() for ref in refs]
        try:
            wanted, lacking = await self.ask(self.actor.hold.remote(key, sent, room_wait_s, current_request.get()))
            yield RayHeldContexts(self, key, (wanted, lacking))
        finally:
            # Not waited for: a request that was cancelled must not wait, and a node that is gone holds nothing.
            with suppress(RayError):
                self.actor.release.remote(key)

    def give(self, command: LoadPages) -> None:
        """Let the ranks there load pages that are in their memory."""
        for rank in self._ranks:
            rank.send(command)

    async def ask(self, call: Awaitable[Any]) -> Any:
        """The answer to a call of its actor; RunnerDied if that is gone."""
        with self.reaching():
            return await answer(call)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Within it, a node that is gone is RunnerDied."""
        try:
            yield
        except RayTaskError:
            raise
        except RayError as error:
            raise RunnerDied(
                f"node {self.node.address}, on which ranks of this DiT run, was lost under this request; send it again"
            ) from error


class RayHeldContexts:
    """HeldElsewhere on a node."""

    def __init__(self, node: RayKvNode, key: str, counts: tuple[int, int]) -> None:
        self._node, self._key, self.counts = node, key, counts

    async def fetch(self) -> None:
        """As HeldElsewhere has it."""
        await self._node.ask(self._node.actor.fetch.remote(self._key, current_request.get()))

    async def land(self, id_: int, refs: Mapping[BranchName, kv_pb2.ContextRef]) -> None:
        """As HeldElsewhere has it."""
        sent = {branch: ref.SerializeToString() for branch, ref in refs.items()}
        call = self._node.actor.land.options(num_returns="streaming").remote(self._key, sent)
        with self._node.reaching():
            async for pages in call:
                self._node.give(LoadPages(id_, await answer(pages)))

    async def check(self) -> None:
        """As HeldElsewhere has it."""
        await self._node.ask(self._node.actor.check.remote(self._key))
