"""Ranks as actors of a Ray cluster, on one node or several.

Every rank gets the commands by calls of its actor, one after the other. Ranks on this server's node attach its shared
memory. On every other node an actor pulls the K/V that the ranks there need (`ray_pages.py`).
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import bagel
from bagel.checkpoint.files import Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import Command, LoadPages
from bagel.engine.events import Broken
from bagel.errors import BagelError, ConfigError, RunnerDied
from bagel.kv.pages import KvLayout
from bagel.prompts import BranchName
from bagel.telemetry.logs import Log, current_request
from bagel.v1 import common_pb2, kv_pb2
from bagel_dit.workers import Place, RankSettings, SharedMemory
from bagel_dit.workers.agreement import Agreement, Disagreement
from bagel_dit.workers.messages import (
    GROUP_SILENCE_S,
    SILENCE_S,
    STOPPED_S,
    Alive,
    Hung,
    LoadFailed,
    Order,
    Ready,
    Report,
    Stop,
)
from bagel_dit.workers.process import is_stopped
from bagel_dit.workers.ray_cluster import Node, Places, check_reachable, connect, disconnect, resource_for, this_node
from bagel_dit.workers.ray_pages import PageActor
from bagel_dit.workers.ray_rank import CALLS, About, Ended, RankActor, Said
from bagel_dit.workers.verdict import GRACE_S, End, Weight, verdict

STOP_S = 10.0
START_S = 120.0
"""Seconds in which an actor answers first: its node imports this package."""

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
        self._ranks: list[_Rank] = []
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
            self._refuse(RunnerDied(f"Ray could not start the ranks: {_one_line(error)}"))

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

    def _rank(self, index: int, resource: str, here: str) -> _Rank:
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
        return _Rank(index, node, actor, step_timeout_s, self._world > 1, here == node.id, self._heard, self._ended)

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
            try:
                await asyncio.gather(
                    *(node.serve(self._settings.config, layout, info.kv_fingerprint) for node in self.nodes)
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


class _Rank:
    """The server's end of one actor. heard and ended are called in the event loop."""

    def __init__(
        self,
        index: int,
        node: Node,
        actor: Any,
        step_timeout_s: float,
        grouped: bool,
        here: bool,
        heard: Callable[[int, Report], None],
        ended: Callable[[End], None],
    ) -> None:
        self.index, self.node, self.actor, self.here = index, node, actor, here
        self._step_timeout_s, self._grouped, self._heard, self._ended = step_timeout_s, grouped, heard, ended
        self._orders: list[Order] = []
        self._ordered = asyncio.Event()
        self._ready, self._over = False, asyncio.Event()
        self.pid = 0

    async def meet(self) -> None:
        """Wait until the actor runs. Raises ConfigError for a node that has another release of this package."""
        try:
            async with asyncio.timeout(START_S):
                about: About = await _answer(self.actor.about.remote())
        except RayActorError as error:
            raise ConfigError(
                f"no rank can be started on node {self.node.address}: {_one_line(error)}; install this release there, "
                "with the extra ray, for the Python that Ray runs with"
            ) from error
        if about.release != bagel.__version__:
            raise ConfigError(
                f"node {self.node.address} has release {about.release} of this package, and this service has "
                f"{bagel.__version__}; install the same on all nodes"
            )
        self.pid = about.pid

    async def free_port(self) -> int:
        """A free port of its node."""
        return int(await _answer(self.actor.free_port.remote(self.node.address)))

    async def start(self, settings: RankSettings, place: Place) -> None:
        """Let the rank load its model."""
        await _answer(self.actor.start.remote(settings, place, self.node.address))

    def send(self, order: Order) -> None:
        """Queue an order; it is lost if the actor has ended."""
        self._orders.append(order)
        self._ordered.set()

    async def stop(self) -> None:
        """Ask the rank to end, and wait for it a while."""
        if self._ready:  # while it loads it takes no orders, and has nothing to finish
            self.send(Stop())
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._over.wait()

    async def send_all(self) -> None:
        """Give the actor its orders, those that have come together in one call, one call after the other."""
        with suppress(RayError):  # `receive` finds that the actor is gone
            while True:
                await self._ordered.wait()
                self._ordered.clear()
                orders, self._orders = self._orders, []
                await _answer(self.actor.order.remote(orders))

    async def receive(self) -> None:
        """Pass on what the rank tells until it ends, or must."""
        try:
            end = await self._pass_on()
        except RayError as error:
            log.error("an actor has ended", rank=self.index, node=self.node.address, error=str(error))
            low = "running low on memory" in str(error)
            cause = "its node has too little memory, and Ray killed it" if low else "its process ended"
            end = End(self.index, cause, Weight.ENDED)
        except Exception as error:  # a report that cannot be read: the next ones make no sense without it
            log.error("a rank's report cannot be read", rank=self.index, exc_info=True)
            end = self._must_end(f"sent a report that cannot be read ({type(error).__name__}), killed")
        self._over.set()
        self._ended(end)

    async def _pass_on(self) -> End:
        limit = self._step_timeout_s  # while it loads: the import of a large library may keep it silent
        while True:
            asked = asyncio.ensure_future(_answer(self.actor.reports.remote()))
            try:
                silent = await self._silence(asked, limit)
            finally:
                asked.cancel()  # nothing where it has come
            if silent:
                log.error("a rank is silent and is killed", why=silent, rank=self.index, node=self.node.address)
                return self._must_end(f"{silent}, killed")
            for report in asked.result():
                match report:
                    case Alive():
                        continue
                    case Said():
                        sys.stderr.write(report.lines)
                    case Ended():
                        return End(self.index, report.cause or "it ended", Weight.TOLD)
                    case Broken():
                        return End(self.index, report.cause, Weight.TOLD)
                    case Hung():
                        doing = "while it loaded the model" if report.loading else "in one step"
                        log.error("a rank hangs and is killed", rank=self.index, stack=report.stack)
                        return self._must_end(f"hung for {self._step_timeout_s:g} s {doing}, killed")
                    case _:
                        if isinstance(report, Ready):
                            self._ready = True
                            # Its model is loaded, so its watch's thread is never silent for long.
                            limit = min(GROUP_SILENCE_S if self._grouped else SILENCE_S, self._step_timeout_s)
                        self._heard(self.index, report)

    async def _silence(self, asked: asyncio.Future[Any], limit_s: float) -> str:
        """Wait for an answer; what the rank does instead if none comes within so many seconds, else an empty text.

        Only time in which this process runs counts.
        """
        # Slices, so that a pause of this process counts as one of them at most.
        slice_s, waited, stopped = min(1.0, limit_s / 4), 0.0, 0.0
        while waited < limit_s:
            done, _ = await asyncio.wait({asked}, timeout=slice_s)
            if done:
                return ""
            waited += slice_s
            # All other ranks wait for it, so it is not given the time that a single one has.
            watched = self._grouped and self.here and self._ready
            stopped = stopped + slice_s if watched and is_stopped(self.pid) else 0.0
            if stopped >= STOPPED_S:
                return f"stopped by a signal for {stopped:g} s"
        return f"silent for {limit_s:g} s"

    def _must_end(self, cause: str) -> End:
        return End(self.index, cause, Weight.KILLED_HERE)


class RayKvNode:
    """A KvNode: the actor that pulls K/V there, and the ranks that it is for. heads: K/V heads that they need."""

    def __init__(self, node: Node, actor: Any, ranks: Sequence[_Rank], heads: tuple[int, int]) -> None:
        self.node, self.actor, self._ranks, self._heads = node, actor, ranks, heads

    async def memory(self) -> SharedMemory:
        """The memory that the ranks there attach."""
        memory: SharedMemory = await self.ask(self.actor.memory.remote(self._heads))
        return memory

    async def serve(self, config: DitConfig, layout: KvLayout, fingerprint: bytes) -> None:
        """Let it get ready to pull K/V of this layout, the whole model's."""
        await self.ask(self.actor.serve.remote(config, layout, fingerprint))

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
            return await _answer(call)

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
                self._node.give(LoadPages(id_, await _answer(pages)))

    async def check(self) -> None:
        """As HeldElsewhere has it."""
        await self._node.ask(self._node.actor.check.remote(self._key))


async def _answer(call: Awaitable[Any]) -> Any:
    """What a call of an actor returns; raises its BagelError as it was raised there, else RayError."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, BagelError):
            raise error.cause from None
        raise


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


def _one_line(error: BaseException) -> str:
    """What Ray says, in a line: the last one, as its texts end with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300].partition(". Some common causes")[0]
