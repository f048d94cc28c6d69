"""A rank that cannot go on says so, also where it has no memory for anything else."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.commands import Begin
from bagel.engine.engine import Engine
from bagel.engine.events import Broken, Event
from bagel.engine.loading import load_role
from bagel.parallel.groups import Groups
from bagel.parallel.mesh import Mesh
from tests.parallel.ranks import Ranks
from tests.shared import MODEL

pytestmark = pytest.mark.slow


class NoMemory(logging.Handler):
    """Where a log is to be written, there is no memory."""

    def handle(self, record: logging.LogRecord) -> bool:
        raise MemoryError


def fail(groups: Groups, *, tells: bool) -> list[Event]:
    """What a rank says that runs out of memory in a command, and then again in the next one."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        if not tells:
            raise MemoryError
        events.append(event)

    loaded = load_role(Checkpoint(MODEL), Role.DENOISE, dtype=torch.float32, device=torch.device("cpu"), groups=groups)
    engine = Engine(loaded, emit)

    def begin(command: Begin) -> None:
        raise MemoryError("no more")

    engine._handlers[Begin] = begin
    logging.getLogger().addHandler(full := NoMemory())
    for _ in range(2):
        with suppress(MemoryError):
            engine.execute(Begin(1))
    logging.getLogger().removeHandler(full)
    return events


def told(groups: Groups) -> Any:
    return fail(groups, tells=True)


def silent(groups: Groups) -> Any:
    return fail(groups, tells=False)


def test_a_rank_without_memory_for_its_log_says_that_it_is_broken(ranks: Ranks) -> None:
    for events in ranks.run(Mesh(cfg=2), told):
        assert events == [Broken("out of memory: no more")]


def test_a_rank_that_cannot_even_say_so_ends(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="its process has ended"):
        ranks.run(Mesh(cfg=2), silent)
