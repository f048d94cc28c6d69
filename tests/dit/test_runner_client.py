"""A DiT whose runner dies: it is started again, and if that cannot be, the service ends for its supervisor."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel.checkpoint.files import EMA
from bagel.deployment.dit_config import DitConfig
from bagel.errors import BagelError, Loading, RunnerDied
from bagel_dit.runner_client import Driver
from tests.conftest import GOLDEN

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


def kill_runner(driver: Driver) -> int:
    pid = driver._runner.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def stop_runner(driver: Driver) -> None:
    """Have the process stand still; only SIGKILL ends it now."""
    assert driver._runner.pid is not None
    os.kill(driver._runner.pid, signal.SIGSTOP)


def driven(model: Path, test: Callable[[Driver, list[bool]], object]) -> None:
    async def main() -> None:
        health: list[bool] = []

        async def on_health(healthy: bool) -> None:
            health.append(healthy)

        config = DitConfig(model=str(model), device="cpu", log_level="ERROR", step_timeout_s=STEP_TIMEOUT_S)
        async with asyncio.timeout(LIMIT_S):
            driver = Driver(config, model, None, on_health)
            try:
                await test(driver, health)  # type: ignore[misc]
            finally:
                await driver.stop()

    asyncio.run(main())


def test_a_runner_that_dies_is_started_again(model: Path) -> None:
    async def test(driver: Driver, health: list[bool]) -> None:
        await driver.loaded()
        kill_runner(driver)
        await until(lambda: health == [True, False, True])
        await driver.loaded()
        assert not driver.failed.done()

    driven(model, test)


def test_a_runner_that_dies_while_it_loads_again_fails_the_driver(model: Path) -> None:
    async def test(driver: Driver, health: list[bool]) -> None:
        await driver.loaded()
        first = kill_runner(driver)
        await until(lambda: driver._runner.pid != first)
        kill_runner(driver)
        with pytest.raises(RunnerDied, match=r"could not be loaded again: .*signal 9"):
            await driver.failed
        assert health == [True, False]
        with pytest.raises(Loading):
            driver.listen(1, asyncio.Queue())

    driven(model, test)


def test_a_runner_that_stands_still_is_killed_and_started_again(model: Path) -> None:
    async def test(driver: Driver, health: list[bool]) -> None:
        await driver.loaded()
        events: asyncio.Queue[Any] = asyncio.Queue()
        driver.listen(1, events)
        stop_runner(driver)
        error = await events.get()
        assert isinstance(error, RunnerDied) and error.grpc_status == "UNAVAILABLE"
        assert re.search(rf"silent for {STEP_TIMEOUT_S:g} s, killed.* send it again", str(error))
        await until(lambda: health == [True, False, True])
        assert not driver.failed.done()

    driven(model, test)


def test_a_first_load_that_stands_still_fails(model: Path) -> None:
    async def test(driver: Driver, health: list[bool]) -> None:
        await asyncio.sleep(0.5)
        stop_runner(driver)
        with pytest.raises(BagelError, match=r"silent for .* killed.* while it loaded the model"):
            await driver.loaded()

    driven(model, test)


def test_a_load_that_hangs_is_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(driver: Driver, health: list[bool]) -> None:
        with pytest.raises(BagelError, match=f"hung for {STEP_TIMEOUT_S:g} s while it loaded the model, killed"):
            await driver.loaded()

    (tmp_path / "sitecustomize.py").write_text(
        "import threading, bagel.rpc.heap\nbagel.rpc.heap.keep_loaded = lambda: threading.Event().wait()"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    driven(model, test)


def test_a_runner_that_is_started_again_loads_no_other_model(model: Path) -> None:
    """A file that was written again is read again; whatever it holds, only the model that is served goes on."""

    async def test(driver: Driver, health: list[bool]) -> None:
        await driver.loaded()
        weights = (model / EMA).read_bytes()
        (model / EMA).unlink()
        (model / EMA).write_bytes(weights)
        kill_runner(driver)
        await until(lambda: health == [True, False, True])
        served = driver.info.checkpoint_fingerprint
        (model / EMA).write_bytes(weights[:-5000] + bytes(4096) + weights[-904:])
        kill_runner(driver)
        with pytest.raises(RunnerDied, match=f"now holds another model, of fingerprint .*serves {served.hex()}"):
            await driver.failed

    driven(model, test)


def test_a_first_load_that_fails_is_told_as_it_is(model: Path) -> None:
    async def test(driver: Driver, health: list[bool]) -> None:
        with pytest.raises(BagelError, match=EMA):
            await driver.loaded()
        assert not driver.failed.done()

    (model / EMA).unlink()
    driven(model, test)
