"""The ranks of an engine: processes that run one program on the same stream of commands. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import Command


@dataclass(frozen=True)
class SharedMemory:
    """Memory that K/V arrive in; a rank on the same host attaches it by name."""

    name: str
    nbytes: int


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
    """One rank of a group. rendezvous: where its ranks meet, as torch.distributed has it; empty for a single rank."""

    index: int = 0
    rendezvous: str = ""


class WorkerGroup(Protocol):
    """All ranks of one engine, from their start to their end. A group whose rank ends is over as a whole.

    A group is made with two callbacks, both called in the event loop: `emit` receives the events of the rank that
    answers, some of them only once all ranks have said the same (`Agreement`); `on_death` is called once, with the rank
    and the cause, when a rank has ended unasked.
    """

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks on this host."""

    def send(self, command: Command) -> None:
        """Give every rank a command, in the same order. It is lost if a rank has ended, which on_death reports."""

    async def stop(self) -> None:
        """End all ranks, by force if they do not end by themselves; on_death is not called."""
