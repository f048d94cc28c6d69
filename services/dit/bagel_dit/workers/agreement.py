"""What a server acts upon by giving something back is passed on once every rank has said it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bagel.engine.commands import AddPicture, AddRequest, Command, Remove
from bagel.engine.events import Begun
from bagel.v1 import common_pb2
from bagel_dit.workers.messages import LoadFailed, Ready, Report

AGREED = (Ready, Begun)
"""Reports of all ranks: a model is ready once each has loaded it, and pages may go once each has copied them."""


class Disagreement(Exception):
    """Ranks have said different things, though all get the same commands."""


class Agreement:
    """Merges the reports of the ranks of one group into those of one engine; the first rank answers."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._ready: dict[int, Ready] = {}
        self._begun: dict[int, dict[int, Begun]] = {}
        self._failed = False

    def sent(self, command: Command) -> None:
        """A command goes to all ranks: a request is begun, or over."""
        match command:
            case AddPicture() | AddRequest():
                self._begun[command.id] = {}
            case Remove():
                # Some ranks may have begun it, and others never will.
                self._begun.pop(command.id, None)

    def add(self, rank: int, report: Report) -> Report | None:
        """Take a rank's report; what is to be passed on now. Raises Disagreement."""
        match report:
            case LoadFailed():
                first, self._failed = not self._failed, True
                return report if first else None  # one is enough, of whichever rank
            case Ready():
                self._ready[rank] = report
                return self._all_ready() if len(self._ready) == self._world else None
            case Begun():
                if (said := self._begun.get(report.id)) is None:
                    return None  # it is over
                said[rank] = report
                _check_alike({each: str(begun) for each, begun in said.items()})
                return report if len(said) == self._world else None
        return report if rank == 0 else None

    def _all_ready(self) -> Ready:
        told = [self._ready[rank] for rank in range(self._world)]
        _check_alike(dict(enumerate(map(_model, told))))
        return replace(told[0], devices=tuple(device for each in told for device in each.devices))


def _check_alike(said: Mapping[int, str]) -> None:
    """Raise Disagreement unless all ranks have said the same."""
    (first, words), *others = said.items()
    for rank, other in others:
        if other != words:
            raise Disagreement(f"rank {rank} says {other}, where rank {first} says {words}")


def _model(ready: Ready) -> str:
    """What all ranks must have alike: the model and the room, on whatever device."""
    info = common_pb2.ModelInfo.FromString(ready.info)
    return f"model {info.checkpoint_fingerprint.hex()} in {info.dtype} with room for {ready.kv_tokens} tokens"
