"""Services as child processes: what is told when they fail, and that none stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bagel.arguments import for_command_line
from bagel.deployment import launcher as launch
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment, reachable
from bagel.deployment.process import Service
from bagel.deployment.schema import DeployConfig
from bagel.errors import BagelError, ConfigError, InitTimeout
from tests.conftest import GOLDEN
from tests.deployment.test_deploy_file import parse_deploy_config

pytestmark = pytest.mark.slow  # each start of services takes seconds

ROOT = Path(__file__).parents[2]
MODEL = GOLDEN / "checkpoint"
LIMIT_S = 60.0


def shipped(name: str) -> DeployConfig:
    return load_deploy_config(shipped_deploy_config(name))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until_gone(pids: list[int], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if alive(pid)]} stay behind"
        time.sleep(0.05)


LATE = [("bagel", r"stage 0 \(thinker\)"), ("bagel_single_stage", r"stage 0 \(dit\)")]


@pytest.mark.parametrize(("name", "stage"), LATE)
def test_late_stage_is_named_and_nothing_stays(name: str, stage: str) -> None:
    deployment = Deployment(shipped(name), MODEL, name="a model", device="cpu", init_timeout_s=0.1)
    began = time.monotonic()
    with pytest.raises(InitTimeout, match=f"{stage}.* not ready after 0.1 s of loading a model") as late:
        deployment.__enter__()
    assert for_command_line(late.value).endswith("; raise --init-timeout")
    assert deployment.services == []
    assert time.monotonic() - began < 10


def test_stage_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(BagelError, match=r"^stage 0 \(thinker\): .*BAGEL checkpoint"):
        Deployment(shipped("bagel"), tmp_path, device="cpu", init_timeout_s=LIMIT_S).__enter__()


def test_each_service_has_its_log(tmp_path: Path) -> None:
    with pytest.raises(InitTimeout):
        Deployment(shipped("bagel"), MODEL, device="cpu", init_timeout_s=1, logs=tmp_path / "logs").__enter__()
    assert "configuration" in (tmp_path / "logs" / "thinker-0.log").read_text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_nothing_outlives_a_killed_parent() -> None:
    program = (
        "import os, sys, time\n"
        "from bagel.deployment.process import Service\n"
        f"arguments = ['--model', {str(MODEL)!r}, '--listen', '127.0.0.1:0', '--device', 'cpu']\n"
        "service = Service('thinker-0', 'stage 0', 'bagel_thinker', arguments, os.environ, None)\n"
        "service.address(time.monotonic() + 30)\n"
        "print(service.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until_gone([pid])


def test_service_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        'print(\'{"event": "listening", "address": "\' + str(child.pid) + \'"}\', flush=True)\n'
        "time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    service = Service("stubborn", "stage 7", "stubborn", [], env, None)
    pids = [service.process.pid, int(service.address(time.monotonic() + LIMIT_S))]
    service.tell_to_stop()
    service.end(0.2)
    until_gone(pids)
    with pytest.raises(BagelError, match="stage 7 was killed by SIGKILL"):
        service.check()


def stage(devices: str) -> object:
    sizes = {"tensor_parallel_size": len(devices.split(","))}
    settings = {"pipeline": "bagel_single_stage", "stages": [{"stage_id": 0, "devices": devices, **sizes}]}
    return parse_deploy_config(settings).stages[0]


@pytest.mark.parametrize(
    ("devices", "visible", "expected"),
    [("0", None, "0"), ("1", "4,7", "7"), ("0,1", "GPU-a, GPU-b", "GPU-a,GPU-b"), ("0", "", ""), ("3", "-1", "-1")],
)
def test_stage_sees_its_gpus_among_ours(devices: str, visible: str | None, expected: str) -> None:
    assert launch._visible_gpus(stage(devices), visible) == expected  # type: ignore[arg-type]


def test_gpu_that_is_hidden_from_us_is_told() -> None:
    with pytest.raises(ConfigError, match=r"stages\[stage_id=0\].devices is '2'; CUDA_VISIBLE_DEVICES shows 2"):
        launch._visible_gpus(stage("2"), "0,1")  # type: ignore[arg-type]


@pytest.mark.parametrize(("address", "call"), [("0.0.0.0:7", "127.0.0.1:7"), ("[::]:7", "[::1]:7"), ("h:7", "h:7")])
def test_address_to_call(address: str, call: str) -> None:
    assert reachable(address) == call


def test_last_exports_of_telemetry_run_at_the_same_time() -> None:
    deployment = Deployment(shipped("bagel"), MODEL, device="cpu")
    for name in ("thinker-0", "dit-0", "gateway"):
        deployment.services.append(Service(name, name, "tests.deployment.exporting", [], os.environ, None))
    pids = [service.process.pid for service in deployment.services]
    for service in deployment.services:
        service.address(time.monotonic() + LIMIT_S)
    began = time.monotonic()
    deployment.stop()
    assert time.monotonic() - began < 4  # each exports for two seconds
    until_gone(pids, 1.0)
