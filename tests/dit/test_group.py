"""A DiT on two ranks: real processes that divide every layer, and what becomes of them when one is lost."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import bagel
from bagel.checkpoint.files import Checkpoint
from bagel.deployment.deploy_file import shipped_deploy_config
from bagel.deployment.dit_config import DitConfig
from bagel.engine.commands import AddRequest
from bagel.engine.events import Begun, Drawn, StepTaken
from bagel.errors import ConfigError, RunnerDied
from bagel.images.output import OutputFormat
from bagel.parity.golden import Golden
from bagel.parity.report import Comparison, absolute
from bagel.parity.runs import case_options
from bagel_dit import __main__ as service
from bagel_dit.runner_client import RunnerClient
from bagel_dit.workers import RankSettings
from tests.conftest import GOLDEN
from tests.helpers import request

LIMIT_S = 240
CHECKPOINT = GOLDEN / "checkpoint"
SERVER = """
import asyncio, json
from pathlib import Path
from bagel.deployment.dit_config import DitConfig
from bagel_dit.runner_client import RunnerClient
from bagel_dit.workers import RankSettings

async def on_health(healthy): ...

async def main(folder):
    config = DitConfig(model=folder, device="cpu", tensor_parallel_size=2, single_stage=True, log_level="ERROR")
    runner = RunnerClient(RankSettings(config, Path(folder)), on_health)
    await runner.loaded()
    print(json.dumps(runner.pids), flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    import sys
    asyncio.run(main(sys.argv[1]))
"""


def settings(**more: Any) -> DitConfig:
    common = {"device": "cpu", "log_level": "ERROR", "single_stage": True, "tensor_parallel_size": 2}
    return DitConfig(model=str(CHECKPOINT), **{**common, **more})


def grouped(test: Callable[[RunnerClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async def on_health(healthy: bool) -> None: ...

        async with asyncio.timeout(LIMIT_S):
            runner = RunnerClient(RankSettings(settings(), CHECKPOINT), on_health)
            try:
                await runner.loaded()
                await test(runner)
            finally:
                await runner.stop()

    asyncio.run(main())


class Drawing:
    """Pictures of one runner after the other."""

    def __init__(self, runner: RunnerClient) -> None:
        self._runner, self._id = runner, 0

    async def draw(self, on_step: Callable[[], object] = lambda: None, **options: Any) -> Any:
        """A picture, or the error that it ended with. on_step: called after its first step."""
        self._id += 1
        events: asyncio.Queue[Any] = asyncio.Queue()
        self._runner.listen(self._id, events)
        self._runner.send(AddRequest(self._id, request("text2img", **options), OutputFormat("PNG")))
        try:
            while True:
                event = await events.get()
                if isinstance(event, Begun):
                    self._runner.begin(event)
                if isinstance(event, StepTaken) and event.step == 1:
                    on_step()
                if isinstance(event, Drawn | Exception):
                    return event
        finally:
            self._runner.forget(self._id)

    async def draws(self) -> bytes:
        """The picture of a group that is well, in the right state after whatever was before."""
        await self._runner.loaded()
        drawn = await self.draw(steps=3)
        assert isinstance(drawn, Drawn), drawn
        assert isinstance(drawn.picture, bytes)
        return drawn.picture


def meetings(folder: Path) -> list[str]:
    """Where ranks meet, of the services whose temporary folder this is."""
    return [each.name for each in folder.glob("bagel-ranks-*")]


def runs(pid: int) -> bool:
    """Whether a process runs: one that has ended may wait for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def no_memory_left(pid: int) -> None:
    """Let a process have no more memory than it has now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
def test_a_rank_that_is_lost_ends_the_request_and_the_group_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def test(runner: RunnerClient) -> None:
        drawing = Drawing(runner)
        wanted = await drawing.draws()
        faults: list[tuple[int, str, Callable[[int], object]]] = [
            (1, "signal 9", lambda pid: os.kill(pid, signal.SIGKILL)),
            (0, "stopped by a signal for 2 s, killed", lambda pid: os.kill(pid, signal.SIGSTOP)),
            (1, "out of memory", no_memory_left),
        ]
        for rank, said, harm in faults:
            pids = runner.pids
            began = time.monotonic()
            counter = Path(f"/dev/shm/torch_{pids[rank]}_1_0")  # as PyTorch has, of a GPU's memory that others read
            counter.touch()
            size = {"width": 512, "height": 512}  # its steps need memory that the first picture did not
            error = await drawing.draw(partial(harm, pids[rank]), steps=1000, **size)
            assert isinstance(error, RunnerDied) and error.grpc_status == "UNAVAILABLE", error
            assert f"rank {rank}: {said}" in str(error)
            assert time.monotonic() - began < 60
            assert not any(map(runs, pids)) and not counter.exists()
            assert await drawing.draws() == wanted

    grouped(test)
    assert not meetings(tmp_path)


@pytest.mark.slow
def test_ranks_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    command, env = (
        [sys.executable, str(tmp_path / "server.py"), str(CHECKPOINT)],
        os.environ | {"TMPDIR": str(tmp_path)},
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        pids = json.loads(server.stdout.readline())
        assert meetings(tmp_path)
        os.kill(pids[0], signal.SIGSTOP)  # the other waits for it in vain
        server.kill()
        os.kill(pids[0], signal.SIGCONT)
    deadline = time.monotonic() + 30
    while any(map(runs, pids)) or meetings(tmp_path):
        assert time.monotonic() < deadline, "ranks outlive their server"
        time.sleep(0.05)


@pytest.mark.slow
def test_two_ranks_that_are_fed_draw_the_recorded_picture() -> None:
    (case,) = [each for each in Golden(GOLDEN).cases("fp32") if each.name == "t2i_64x64_x_renorm_min0.95"]
    report = Comparison(case.name, {}, absolute(1e-4))
    deploy = shipped_deploy_config("bagel")
    with bagel.Omni(str(CHECKPOINT), deploy_config=deploy, device="cpu", tensor_parallel_size=2) as omni:
        options = {name: value for name, value in case_options(case).items() if name not in ("posterior", "think")}
        (result,) = omni.generate(case.data["inputs"][0], **options)
    assert result.image is not None
    report.picture("image", result.image, case.pictures["image"])
    assert not report.failures


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="do not divide among 4 tensor-parallel ranks; choose a size of 1, 2"):
        service.check_ranks(settings(tensor_parallel_size=4), checkpoint)
    monkeypatch.setattr(service, "gpu_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks need a GPU each, and the driver shows 1; choose smaller sizes"):
        service.check_ranks(settings(device="cuda"), checkpoint)
    service.check_ranks(settings(device="cpu"), checkpoint)
