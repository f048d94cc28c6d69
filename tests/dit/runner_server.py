"""The server's end of a single stage's runner that runs in a thread, spoken to as its server does."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from google.rpc import status_pb2

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.kv.arena import Arena
from bagel.rpc import convert
from bagel_dit.messages import (
    Alive,
    Command,
    Failed,
    Output,
    Planned,
    Read,
    Ready,
    Reply,
    Serve,
    Stepped,
    StepPlan,
    Stop,
)
from bagel_dit.pulse import Pulses, Watch
from bagel_dit.runner import Runner, load
from bagel_dit.runner_process import Pipe
from tests.conftest import GOLDEN
from tests.helpers import request

LIMIT_S = 30
READ = StepPlan((), read=True)


class Server:
    """The other end of a single stage's runner, which runs in a thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.runner: Runner | None = None
        self.replies: list[Reply] = []
        """What came of the latest request, up to where it was planned."""

    def send(self, command: Command) -> None:
        self._connection.send(command)

    def next(self) -> Reply:
        """The next reply that is about something; one that only says that it runs is no answer."""
        until = time.monotonic() + LIMIT_S
        while True:
            assert self._connection.poll(max(0.0, until - time.monotonic())), "the runner does not answer"
            reply: Reply = self._connection.recv()
            if not isinstance(reply, Alive):
                return reply

    def until(self, *kinds: type) -> list[Reply]:
        """Replies up to the first of these kinds."""
        replies = [self.next()]
        while not isinstance(replies[-1], kinds):
            replies.append(self.next())
        return replies

    def begin(self, id_: int, modality: str = "text2text", **options: Any) -> None:
        """Give the runner a request, up to where it is to be read."""
        asked = request(modality, **options)
        message = convert.request_to_wire(asked, (convert.part_to_wire(part) for part in asked.prompt))
        self.send(Serve(id_, message.SerializeToString(), Output()))
        self.replies = self.until(Planned, Failed)
        assert self.replies[-1] == Planned(id_)
        self.send(Read(id_))

    def read(self) -> list[Reply]:
        """What comes of reading and writing until there is nothing left to do."""
        replies: list[Reply] = []
        while True:
            self.send(READ)
            replies += self.until(Stepped)
            if not replies[-1].reading:  # type: ignore[union-attr]
                return replies


@contextmanager
def serving(arena: Arena | None = None, device: str = "cpu", **settings: Any) -> Iterator[Server]:
    """A runner of the recordings' checkpoint. arena: shared memory with K/V, of one that draws from contexts."""
    ours, theirs = multiprocessing.Pipe()
    folder = GOLDEN / "checkpoint"
    about: dict[str, Any] = {"single_stage": arena is None, "device": device, "dtype": "float32", "max_num_seqs": 4}
    config = DitConfig(model=str(folder), log_level="ERROR", **about, **settings)
    server = Server(ours)

    def run() -> None:
        pipe, pulses = Pipe(theirs), Pulses()
        server.runner = Runner(pipe, pulses, arena, config, load(config, Checkpoint(folder)))
        Watch(pulses, config.step_timeout_s, pipe.send).start()
        server.runner.run()

    thread = Thread(target=run, daemon=True)
    thread.start()
    assert isinstance(server.next(), Ready)
    yield server
    server.send(Stop())
    thread.join(LIMIT_S)
    ours.close()
    theirs.close()


def of(replies: list[Reply], kind: type) -> list[int]:
    """The requests that such replies are about."""
    return [reply.id for reply in replies if isinstance(reply, kind)]  # type: ignore[union-attr]


def failures(replies: list[Reply]) -> dict[int, str]:
    statuses = {reply.id: status_pb2.Status.FromString(reply.status) for reply in replies if isinstance(reply, Failed)}
    return {id_: status.message for id_, status in statuses.items()}
