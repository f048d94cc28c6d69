"""A DiT on two ranks: real processes that divide every layer, and what becomes of them when one is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import AddRequest
from bagel.engine.events import Drawn, StepTaken
from bagel.errors import RunnerDied
from bagel.images.output import OutputFormat
from bagel_dit.runner_client import RunnerClient
from bagel_dit.workers import RankSettings
from tests.conftest import GOLDEN
from tests.helpers import request

pytestmark = pytest.mark.slow  # it starts groups of processes

LIMIT_S = 120


def grouped(test: Callable[[RunnerClient], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async def on_health(healthy: bool) -> None: ...

        folder = GOLDEN / "checkpoint"
        config = DitConfig(
            model=str(folder), device="cpu", log_level="ERROR", tensor_parallel_size=2, single_stage=True, **settings
        )
        async with asyncio.timeout(LIMIT_S):
            runner = RunnerClient(RankSettings(config, folder), on_health)
            try:
                await runner.loaded()
                await test(runner)
            finally:
                await runner.stop()

    asyncio.run(main())


async def draw(runner: RunnerClient, id_: int, steps: int = 3, on_step: Callable[[], object] = lambda: None) -> Any:
    """A picture, or the error that it ended with. on_step: called after its first step."""
    events: asyncio.Queue[Any] = asyncio.Queue()
    runner.listen(id_, events)
    runner.send(AddRequest(id_, request("text2img", steps=steps), OutputFormat("PNG")))
    while True:
        event = await events.get()
        if hasattr(event, "bucket"):
            runner.begin(event)
        if isinstance(event, StepTaken) and event.step == 1:
            on_step()
        if isinstance(event, Drawn | Exception):
            runner.forget(id_)
            return event


def test_two_ranks_draw() -> None:
    async def test(runner: RunnerClient) -> None:
        drawn = await draw(runner, 1)
        assert isinstance(drawn, Drawn), drawn

    grouped(test)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_lost(number: int, rank: int) -> None:
    async def test(runner: RunnerClient) -> None:
        pids = runner.pids
        error = await draw(runner, 1, steps=1000, on_step=lambda: os.kill(pids[rank], number))
        assert isinstance(error, RunnerDied), error
        said = "signal 9" if number == signal.SIGKILL else "stopped by a signal for 2 s, killed"
        assert f"rank {rank}: {said}" in str(error)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        await runner.loaded()
        assert isinstance(await draw(runner, 2), Drawn)

    grouped(test)
