"""`bagel serve` as a process: its address, its end by a signal, its end when a service dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import bagel
from bagel.cli import main
from bagel.client import Client
from bagel.deployment.launcher import is_serving
from bagel.rpc.transport import sync_channel
from bagel.v1 import thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub
from tests.conftest import GOLDEN
from tests.deployment.test_launcher import until_gone

pytestmark = pytest.mark.slow  # each start of services takes seconds

ROOT = Path(__file__).parents[2]
LIMIT_S = 60


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process once it is ready, and its gateway's address."""
    command = [sys.executable, "-m", "bagel.cli", "serve", "--port", "0", "--device", "cpu", *arguments]
    env = os.environ | {"BAGEL_MODEL": str(GOLDEN / "checkpoint")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **streams) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def children(process: subprocess.Popen[str]) -> dict[str, int]:
    """The services' process ids by their modules."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if parent == process.pid and "bagel.deployment.child" in command:
            found[command[command.index("bagel.deployment.child") + 1]] = int(entry.name)
    return found


def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    front = ("--http", "127.0.0.1:0", "--served-model-name", "ours", "--allow-origin", "https://app.example")
    bounded = ("--log-dir", str(logs), "--log-max-bytes", "2048", "--log-files", "3")
    with serving("--deploy-config", "deploy/bagel_single_stage.yaml", *bounded, *front) as (process, address):
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        assert is_serving(address)
        with Client(address) as client:
            assert client.generate("a", modality="text2text", max_tokens=3, timeout=LIMIT_S).text
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert f"bagel generate --endpoint {address}" in err
    assert re.search(r"dit-0 is ready at 127\.0\.0\.1:\d+, [0-9.]+ s; stage 0", err)
    assert "Traceback" not in err + "".join(log.read_text() for log in logs.iterdir())
    kept = {f"{name}.log{older}" for name in ("dit-0", "gateway") for older in ("", ".1", ".2")}
    assert {"dit-0.log", "gateway.log", "gateway.log.1"} <= {log.name for log in logs.iterdir()} <= kept
    assert all(log.stat().st_size < 2048 + 4096 for log in logs.iterdir())


def test_reports_of_each_request_are_in_the_logs(tmp_path: Path) -> None:
    reports = ("--log-stats", "--enable-diffusion-pipeline-profiler", "--log-dir", str(tmp_path))
    with serving("--deploy-config", "deploy/bagel_single_stage.yaml", *reports) as (process, address):
        with Client(address) as client:
            drawn = client.generate("a cube", steps=13, height=64, width=64, request_id="cube", timeout=LIMIT_S)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
    stats, profile = logged(tmp_path / "gateway.log", "stats"), logged(tmp_path / "dit-0.log", "diffusion profile")
    assert stats["request_id"] == profile["request_id"] == "cube"
    assert {"context", "denoise", "decode", "first_step", "total"} <= stats["seconds"].keys()
    assert stats["usage"]["steps"] == 12
    assert list(profile["seconds"]) == list(drawn.profile) == ["context", "denoise 1-10", "denoise 11-12", "decode"]


def logged(log: Path, event: str) -> dict[str, Any]:
    """The one line of a log with that event."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    (found,) = [line for line in lines if line["event"] == event]
    return dict(found)


def test_engine_goes_from_the_flag_to_the_thinker_whatever_the_environment_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAGEL_MODEL", str(GOLDEN / "checkpoint"))
    monkeypatch.setenv("BAGEL_ENGINE", "torch")
    serve = ["serve", "--port", "0", "--device", "cpu", "--engine"]
    assert main([*serve, "sglang"]) == 2
    assert "invalid choice: 'sglang'" in capsys.readouterr().err
    if find_spec("vllm") is None:
        assert main([*serve, "vllm"]) == 2
        assert "stage 0 (thinker): --engine vllm needs vLLM, which is not installed here" in capsys.readouterr().err
    monkeypatch.setenv("BAGEL_ENGINE", "vllm")
    with bagel.Omni(device="cpu", engine="torch") as omni:
        (thinker, *_) = omni._engine.deployment.services
        with sync_channel(thinker.address(0)) as channel:
            told = ThinkerServiceStub(channel).Describe(thinker_pb2.ThinkerServiceDescribeRequest())
    assert told.engine == "torch"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_service_that_dies_ends_it_with_its_name() -> None:
    with serving() as (process, address):
        assert address
        services = children(process)
        assert set(services) == {"bagel_thinker", "bagel_dit", "bagel_gateway"}
        os.kill(services["bagel_thinker"], signal.SIGKILL)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert re.match(r"bagel: error: stage 0 \(thinker\) was killed by SIGKILL", err.splitlines()[-1])
    assert any(line.startswith("gateway | {") for line in err.splitlines())
    until_gone(list(services.values()))


WRONG = [
    (["--port", "70000"], 2, "'70000' is no port"),
    (["M", "--prompts", "x"], 2, "'M' belongs to no flag; a model goes behind --model; unknown flag '--prompts'"),
    (["--model", "/no/such"], 2, "no checkpoint folder '/no/such'"),
    (["--deploy-config", "none.yaml"], 2, "none.yaml cannot be read"),
    (["--log-files", "3"], 2, "--log-files has no effect without --log-dir"),
    (["--allow-origin", "https://a.example"], 2, "--allow-origin has no effect without --http"),
    (["--http", "127.0.0.1:0", "--allow-host", "a/b"], 2, "--allow-host is 'a/b'; write a name alone"),
    (["--log-dir", "README.md"], 2, "--log-dir 'README.md' cannot be made"),
    (["--init-timeout", "1", "--device", "cpu"], 1, "stage 0 (thinker)"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG, ids=lambda value: str(value))
def test_what_is_wrong_is_told(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAGEL_MODEL", str(GOLDEN / "checkpoint"))
    monkeypatch.chdir(ROOT)
    assert main(["serve", *arguments]) == code
    assert said in capsys.readouterr().err.splitlines()[-1]
