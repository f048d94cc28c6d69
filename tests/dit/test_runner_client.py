"""A DiT whose runner dies: it is started again, and if that cannot be, the service ends for its supervisor."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel.checkpoint.files import EMA, Checkpoint
from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import Advance, Begin, Command, LoadPages
from bagel.engine.early_step import least_layers
from bagel.engine.events import Begun
from bagel.errors import BagelError, Loading, RunnerDied
from bagel.kv.arena import Arena
from bagel_dit.runner_client import RunnerClient
from bagel_dit.workers import RankSettings, SharedMemory
from bagel_dit.workers.process import ProcessGroup
from tests.conftest import GOLDEN
from tests.engine import test_early_step as early

pytestmark = pytest.mark.slow  # each start of a runner takes seconds

LIMIT_S = 90
STEP_TIMEOUT_S = 5.0
"""More than a busy machine needs to start a thread."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The checkpoint, in a folder that may lose a file."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (GOLDEN / "checkpoint").iterdir():
        (folder / file.name).symlink_to(file)
    return folder


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def kill_runner(runner: RunnerClient) -> int:
    pid = runner.pids[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def stop_runner(runner: RunnerClient) -> None:
    """Have the process stand still; only SIGKILL ends it now."""
    os.kill(runner.pids[0], signal.SIGSTOP)


def driven(
    model: Path,
    test: Callable[[RunnerClient, list[bool]], object],
    memory: SharedMemory | None = None,
    **more: Any,
) -> None:
    async def main() -> None:
        health: list[bool] = []

        async def on_health(healthy: bool) -> None:
            health.append(healthy)

        config = DitConfig(model=str(model), device="cpu", log_level="ERROR", step_timeout_s=STEP_TIMEOUT_S, **more)
        async with asyncio.timeout(LIMIT_S):
            runner = RunnerClient(RankSettings(config, model, memory=memory), on_health)
            try:
                await test(runner, health)  # type: ignore[misc]
            finally:
                await runner.stop()

    asyncio.run(main())


def test_a_runner_that_dies_is_started_again(model: Path) -> None:
    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await runner.loaded()
        kill_runner(runner)
        await until(lambda: health == [True, False, True])
        await runner.loaded()
        assert not runner.failed.done()

    driven(model, test)


def test_a_runner_that_dies_while_it_loads_again_fails_the_driver(model: Path) -> None:
    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await runner.loaded()
        first = kill_runner(runner)
        await until(lambda: runner.pids[0] != first)
        kill_runner(runner)
        with pytest.raises(RunnerDied, match=r"could not be loaded again: .*signal 9"):
            await runner.failed
        assert health == [True, False]
        with pytest.raises(Loading):
            runner.listen(1, asyncio.Queue())

    driven(model, test)


def test_a_runner_that_cannot_even_be_started_again_fails_the_driver(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await runner.loaded()
        monkeypatch.setattr("multiprocessing.process.BaseProcess.start", no_memory)
        kill_runner(runner)
        with pytest.raises(RunnerDied, match=r"could not be loaded again: .*Cannot allocate memory"):
            await runner.failed
        await until(lambda: health == [True, False])

    driven(model, test)


def test_a_runner_that_stands_still_is_killed_and_started_again(model: Path) -> None:
    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await runner.loaded()
        events: asyncio.Queue[Any] = asyncio.Queue()
        runner.listen(1, events)
        stop_runner(runner)
        error = await events.get()
        assert isinstance(error, RunnerDied) and error.grpc_status == "UNAVAILABLE"
        assert re.search(rf"silent for {STEP_TIMEOUT_S:g} s, killed.* send it again", str(error))
        await until(lambda: health == [True, False, True])
        assert not runner.failed.done()

    driven(model, test)


def test_a_first_load_that_stands_still_fails(model: Path) -> None:
    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await asyncio.sleep(0.5)
        stop_runner(runner)
        with pytest.raises(BagelError, match=r"silent for .* killed.* while it loaded the model"):
            await runner.loaded()

    driven(model, test)


def test_a_load_that_hangs_is_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(runner: RunnerClient, health: list[bool]) -> None:
        with pytest.raises(BagelError, match=f"hung for {STEP_TIMEOUT_S:g} s while it loaded the model, killed"):
            await runner.loaded()

    (tmp_path / "sitecustomize.py").write_text(
        "import threading, bagel.rpc.heap\nbagel.rpc.heap.keep_loaded = lambda: threading.Event().wait()"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    driven(model, test)


def test_a_runner_that_is_started_again_loads_no_other_model(model: Path) -> None:
    """A file that was written again is read again; whatever it holds, only the model that is served goes on."""

    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await runner.loaded()
        weights = (model / EMA).read_bytes()
        (model / EMA).unlink()
        (model / EMA).write_bytes(weights)
        kill_runner(runner)
        await until(lambda: health == [True, False, True])
        served = runner.info.checkpoint_fingerprint
        (model / EMA).write_bytes(weights[:-5000] + bytes(4096) + weights[-904:])
        kill_runner(runner)
        with pytest.raises(RunnerDied, match=f"now holds another model, of fingerprint .*serves {served.hex()}"):
            await runner.failed

    driven(model, test)


def test_a_first_load_that_fails_is_told_as_it_is(model: Path) -> None:
    async def test(runner: RunnerClient, health: list[bool]) -> None:
        with pytest.raises(BagelError, match=EMA):
            await runner.loaded()
        assert not runner.failed.done()

    (model / EMA).unlink()
    driven(model, test)


@pytest.mark.parametrize("eager", [False, True])
def test_a_first_step_is_computed_as_far_as_kv_have_landed(
    model: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, eager: bool
) -> None:
    llm, send, sent = checkpoint.config.llm, ProcessGroup.send, list[Command]()
    kv = early.memory(llm).numpy()
    arena = Arena(kv.nbytes)
    arena.buffer[:] = kv.data

    def watched(group: ProcessGroup, command: Command) -> None:
        sent.append(command)
        send(group, command)

    monkeypatch.setattr(ProcessGroup, "send", watched)
    least, last = least_layers(llm.num_hidden_layers), llm.num_hidden_layers - 1
    # With these layers there it goes on, each time by what is new.
    advances = () if eager else range(least, last + 1)

    async def test(runner: RunnerClient, health: list[bool]) -> None:
        await runner.loaded()
        events: asyncio.Queue[Any] = asyncio.Queue()
        runner.listen(1, events)
        runner.send(early.picture(1))
        for number in range(llm.num_hidden_layers):
            runner.send(LoadPages(1, early.layer(llm, number)))
            while sent.count(Advance(1)) < sum(layers <= number + 1 for layers in advances):
                await asyncio.sleep(0.02)
        runner.send(Begin(1))
        begun = await events.get()
        assert isinstance(begun, Begun) and begun.layers_ahead == (0 if eager else last)
        assert sent.count(Advance(1)) == len(advances)

    driven(model, test, SharedMemory(arena.name, arena.nbytes), enforce_eager=eager)
