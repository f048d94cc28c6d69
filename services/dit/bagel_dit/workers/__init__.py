"""The ranks of an engine: processes that run one program on the same stream of commands. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import Command
from bagel.prompts import BranchName
from bagel.v1.kv_pb2 import ContextRef


@dataclass(frozen=True)
class SharedMemory:
    """Memory that K/V arrive in; a rank on the same host attaches it by name.

    heads: K/V heads of the model that its rows have, begin and end; None: all.
    """

    name: str
    nbytes: int
    heads: tuple[int, int] | None = None


@dataclass(frozen=True)
class RankSettings:
    """What each rank is started with, whole and picklable.

    folder: of the checkpoint. fingerprint: of the checkpoint that the service has announced to its callers, else
    empty; a rank loads no other. memory: None for ranks that serve whole requests, to which no K/V are sent.
    """

    config: DitConfig
    folder: Path
    fingerprint: bytes = b""
    memory: SharedMemory | None = None


@dataclass(frozen=True)
class Place:
    """One rank of a group. rendezvous: where its ranks meet, as torch.distributed has it; empty for a single rank.

    gpu: of those that its process sees; None: that of its index.
    """

    index: int = 0
    rendezvous: str = ""
    gpu: int | None = None


class HeldElsewhere(Protocol):
    """Contexts of one picture in the memory of another host, kept until the request is done with them."""

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes of their distinct segments: of all, and of those that were not there yet."""

    async def fetch(self) -> None:
        """Pull what is missing; raises as `HeldContexts.fetch`. The caller keeps the leases of their sources."""

    async def land(self, id_: int, refs: Mapping[BranchName, ContextRef]) -> None:
        """Give the ranks there every page of a picture's contexts as it becomes ready, until the last."""

    async def check(self) -> None:
        """Raises LeaseLapsed unless they have been kept without a break."""


class KvNode(Protocol):
    """Another host on which ranks run. It pulls the K/V that they need from the sources, once for all of them."""

    def hold(self, refs: Sequence[ContextRef], room_wait_s: float | None) -> AbstractAsyncContextManager[HeldElsewhere]:
        """Keep contexts there; as `KvPuller.hold`."""


class WorkerGroup(Protocol):
    """All ranks of one engine, from their start to their end. A group whose rank ends is over as a whole.

    A group is made with two callbacks, both called in the event loop: `emit` receives the events of the rank that
    answers, some of them only once all ranks have said the same (`Agreement`); `on_death` is called once, with the rank
    and the cause, when a rank has ended unasked.
    """

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks on this host."""

    @property
    def here(self) -> bool:
        """Whether a rank runs on this host, and reads K/V in the server's memory."""

    @property
    def nodes(self) -> Sequence[KvNode]:
        """The other hosts with ranks, once the group is ready."""

    def send(self, command: Command) -> None:
        """Give every rank a command, in the same order. It is lost if a rank has ended, which on_death reports.

        LoadPages, which names places in the server's memory, goes to the ranks of this host alone.
        """

    async def stop(self) -> None:
        """End all ranks, by force if they do not end by themselves; on_death is not called."""
