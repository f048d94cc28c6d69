"""Ranks as actors of a Ray cluster, on one node or several.

Every rank gets the commands by calls of its actor, one after the other. Ranks on this server's node attach its shared
memory. On every other node an actor pulls the K/V that the ranks there need (`ray_pages.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import Command, LoadPages
from bagel.errors import BagelError, ConfigError, RunnerDied
from bagel.kv.pages import KvLayout
from bagel.telemetry.logs import Log
from bagel.v1 import common_pb2
from bagel_dit.workers import Place, RankSettings
from bagel_dit.workers.agreement import Agreement, Disagreement
from bagel_dit.workers.messages import LoadFailed, Ready, Report
from bagel_dit.workers.ray_cluster import Node, Places, check_reachable, connect, disconnect, resource_for, this_node
from bagel_dit.workers.ray_kv_node import RayKvNode
from bagel_dit.workers.ray_pages import PageActor
from bagel_dit.workers.ray_rank import CALLS, RankActor
from bagel_dit.workers.ray_remote import RemoteRank, one_line
from bagel_dit.workers.verdict import GRACE_S, End, Weight, verdict

log = Log("bagel.dit")
T = TypeVar("T")


class RayGroup:
    """A WorkerGroup of one actor a rank. It connects, waits for places and starts the actors by itself."""

    def __init__(
        self, settings: RankSettings, *, emit: Callable[[Report], None], on_death: Callable[[str], None]
    ) -> None:
        self._settings, self._emit = settings, emit
        self._on_death: Callable[[str], None] | None = on_death
        self._world = settings.config.parallel.world_size
        self._agreement, self._ends = Agreement(self._world), list[End]()
        self._places: Places | None = None
        self._ranks: list[RemoteRank] = []
        self.nodes: tuple[RayKvNode, ...] = ()
        self._ending: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._start())

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.pid for rank in self._ranks if rank.here)

    @property
    def here(self) -> bool:
        """As WorkerGroup has it."""
        return any(rank.here for rank in self._ranks)

    def send(self, command: Command) -> None:
        """As WorkerGroup has it. Pages in this server's memory are for the ranks of its node."""
        self._agreement.sent(command)
        for rank in self._ranks:
            if rank.here or not isinstance(command, LoadPages):
                rank.send(command)

    async def stop(self) -> None:
        """As WorkerGroup has it. The connection to the cluster ends too, and a Ray that was started here."""
        ready, self._on_death = self._on_death is not None and not self._ends, None
        if ready and self._ranks:
            await asyncio.gather(*(rank.stop() for rank in self._ranks))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._ending is not None:
            await self._ending
        await asyncio.to_thread(self._give_back)
        await asyncio.to_thread(disconnect)

    async def _start(self) -> None:
        try:
            await self._place()
        except BagelError as error:
            self._refuse(error)
        except Exception as error:  # whatever it is, a group that has not started must not be waited for
            log.error("the ranks could not be started", exc_info=True)
            self._refuse(RunnerDied(f"Ray could not start the ranks: {one_line(error)}"))

    async def _place(self) -> None:
        """Start the actors where the cluster has places for them."""
        config = self._settings.config
        if config.ray_address is not None:
            await check_reachable(config.ray_address)
        await asyncio.to_thread(connect, config.ray_address, self._world)
        resource = resource_for(config.device)
        self._places = places = await asyncio.to_thread(Places, self._world, resource)
        await places.settled(config.ray_timeout_s)
        here = this_node()
        self._ranks = [self._rank(index, resource, here) for index in range(self._world)]
        await asyncio.gather(*(rank.meet() for rank in self._ranks))
        memories = {here: self._settings.memory}
        if self._settings.memory is not None:
            elsewhere = dict.fromkeys(node for node in places.nodes if node.id != here)
            _check_sources(config, elsewhere, [node for node in places.nodes if node.id == here])
            self.nodes = tuple(self._kv_node(node) for node in elsewhere)
            for each in self.nodes:
                memories[each.node.id] = await each.memory()
        rendezvous = ""
        if self._world > 1:
            first = self._ranks[0]
            rendezvous = f"tcp://{_bracketed(first.node.address)}:{await first.free_port()}"
        # A GPU that Ray has given to a rank is the only one that it sees.
        config = replace(config, device="cpu" if resource == "CPU" else "cuda")
        for rank in self._ranks:
            settings = replace(self._settings, config=config, memory=memories.get(rank.node.id))
            await rank.start(settings, Place(rank.index, rendezvous, gpu=0))
        placed = [f"{rank.index}: {rank.node.address}" for rank in self._ranks]
        log.info("ranks placed", ranks=placed, resource=resource, kv_nodes=len(self.nodes))
        for rank in self._ranks:
            self._spawn(rank.receive())
            self._spawn(rank.send_all())

    def _rank(self, index: int, resource: str, here: str) -> RemoteRank:
        assert self._places is not None
        bundle, node = self._places.bundles[index], self._places.nodes[index]
        actor = (
            ray.remote(RankActor)
            .options(
                num_cpus=int(resource == "CPU"),
                num_gpus=int(resource == "GPU"),
                max_concurrency=CALLS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._places.group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
        )
        step_timeout_s = self._settings.config.step_timeout_s
        return RemoteRank(
            index, node, actor, step_timeout_s, self._world > 1, here == node.id, self._heard, self._ended
        )

    def _kv_node(self, node: Node) -> RayKvNode:
        """A node that is not this server's, for whose ranks an actor pulls K/V."""
        config = self._settings.config
        actor = (
            ray.remote(PageActor)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            .remote(config.kv_cache_bytes, config.log_level)
        )
        ranks = [rank for rank in self._ranks if rank.node.id == node.id]
        llm = Checkpoint(self._settings.folder).config.llm
        heads = [config.parallel.rank(rank.index).decoder(llm).kv_heads for rank in ranks]
        return RayKvNode(node, actor, ranks, (min(each.start for each in heads), max(each.stop for each in heads)))

    def _heard(self, rank: int, report: Report) -> None:
        if self._on_death is None or self._ends:
            return  # it is over: what ranks say now leads to nothing
        try:
            agreed = self._agreement.add(rank, report)
        except Disagreement as error:
            self._ended(End(rank, f"{error}, killed", Weight.KILLED_HERE))
            return
        if isinstance(agreed, Ready):
            self._spawn(self._serve_pages(agreed))
        elif agreed is not None:
            self._emit(agreed)

    async def _serve_pages(self, ready: Ready) -> None:
        """Let the other nodes get ready to pull too, and then say that the group is."""
        info, llm = common_pb2.ModelInfo.FromString(ready.info), Checkpoint(self._settings.folder).config.llm
        if self.nodes:
            layout = KvLayout(llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim, info.dtype)
            config, pinned = self._settings.config, info.device.startswith("cuda")
            try:
                await asyncio.gather(
                    *(node.serve(config, layout, info.kv_fingerprint, pinned=pinned) for node in self.nodes)
                )
            except BagelError as error:
                self._refuse(error)
                return
        if self._on_death is not None and not self._ends:
            self._emit(ready)

    def _refuse(self, error: BagelError) -> None:
        """The group cannot be started, for a reason that a user can mend."""
        if self._on_death is not None:
            self._emit(LoadFailed(error))
            self._ended(End(0, str(error), Weight.TOLD))

    def _ended(self, end: End) -> None:
        """A rank has ended or must; without it the others would wait for it for ever."""
        if self._on_death is None:
            return
        self._ends.append(end)
        if len(self._ends) == 1:
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        """Find out why, take the whole group down, and report the death."""
        if self._world > 1 and self._ranks:
            # Others lose it too and may say so first: a moment shows which one was the first to go.
            await asyncio.sleep(GRACE_S)
        lost = await self._lost_nodes()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.to_thread(self._give_back)
        # Once, and not if the group was stopped meanwhile.
        on_death, self._on_death = self._on_death, None
        if on_death is None:
            return
        end = verdict(self._ends)
        where = f" on node {self._ranks[end.rank].node.address}" if self._ranks else ""
        on_death(lost or (f"rank {end.rank}{where}: {end.cause}" if self._world > 1 else f"{end.cause}{where}"))

    async def _lost_nodes(self) -> str:
        """Which nodes are lost, and the ranks with them; empty if none is."""
        nodes = list(dict.fromkeys(rank.node for rank in self._ranks))
        lost = [node for node, gone in zip(nodes, await _all(node.is_lost() for node in nodes), strict=True) if gone]
        if not lost:
            return ""
        ranks = ", ".join(str(rank.index) for rank in self._ranks if rank.node in lost)
        names = " and ".join(f"node {node.address}" for node in lost)
        return f"{names} {'was' if len(lost) == 1 else 'were'} lost, with rank {ranks}"

    def _give_back(self) -> None:
        """Kill all actors and give their places back. Blocks."""
        for actor in (*(rank.actor for rank in self._ranks), *(node.actor for node in self.nodes)):
            with suppress(Exception):  # it may be gone, and the cluster too
                ray.kill(actor)
        if self._places is not None:
            self._places.give_back()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        # The event loop itself keeps only a weak reference to a task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _all(works: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*works))


def _check_sources(config: DitConfig, elsewhere: Iterable[Node], here: Sequence[Node]) -> None:
    """Raise ConfigError for a source that other machines cannot reach, as its address is each machine's own."""
    ours = {node.address for node in here}
    far = [node.address for node in elsewhere if node.address not in ours]
    for name, address in config.source_addresses.items():
        if far and is_loopback(address):
            raise ConfigError(
                f"the source {name}={address} has an address of this machine alone, and node {far[0]} has to pull from "
                "it; give an address that all nodes reach"
            )


def is_loopback(address: str) -> bool:
    """Whether a service's host:port can be reached on its own machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
