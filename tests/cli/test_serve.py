"""`bagel serve` as a process: its address, its end by a signal, its end when a service dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bagel.cli import main
from bagel.client import Client
from bagel.deployment.gpus import has_gpu
from bagel.deployment.launcher import is_serving
from tests.conftest import GOLDEN
from tests.deployment.test_launcher import until_gone

pytestmark = pytest.mark.slow  # each start of services takes seconds

ROOT = Path(__file__).parents[2]
LIMIT_S = 60
SINGLE_STAGE = ("--deploy-config", "deploy/bagel_single_stage.yaml")


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


def test_sigterm_ends_it_cleanly_and_its_logs_have_each_request(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    front = ("--http", "127.0.0.1:0", "--served-model-name", "ours", "--allow-origin", "https://app.example")
    bounded = ("--log-dir", str(logs), "--log-max-bytes", "2048", "--log-files", "9")
    reports = ("--log-stats", "--enable-diffusion-pipeline-profiler")
    with serving(*SINGLE_STAGE, *bounded, *front, *reports) as (process, address):
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        assert is_serving(address)
        with Client(address) as client:
            drawn = client.generate("a cube", steps=13, height=64, width=64, request_id="cube", timeout=LIMIT_S)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert f"bagel generate --endpoint {address}" in err
    assert re.search(r"dit-0 is ready at 127\.0\.0\.1:\d+, [0-9.]+ s; stage 0", err)
    assert "Traceback" not in err + "".join(log.read_text() for log in logs.iterdir())
    kept = {f"{name}.log{older}" for name in ("dit-0", "gateway") for older in ("", *(f".{i}" for i in range(1, 9)))}
    assert {"dit-0.log", "gateway.log", "gateway.log.1"} <= {log.name for log in logs.iterdir()} <= kept
    assert all(log.stat().st_size < 2048 + 4096 for log in logs.iterdir())
    stats, profile = logged(logs, "gateway", "stats"), logged(logs, "dit-0", "diffusion profile")
    assert stats["request_id"] == profile["request_id"] == "cube"
    assert {"context", "denoise", "decode", "first_step", "total"} <= stats["seconds"].keys()
    assert stats["usage"]["steps"] == 12
    assert list(profile["seconds"]) == list(drawn.profile) == ["context", "denoise 1-10", "denoise 11-12", "decode"]


def logged(logs: Path, service: str, event: str) -> dict[str, Any]:
    """The one line of a service's log with that event."""
    texts = [log.read_text() for log in logs.glob(f"{service}.log*")]
    lines = (json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{"))
    (found,) = [line for line in lines if line["event"] == event]
    return dict(found)


def test_an_engine_that_is_not_here_is_told(
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_service_that_dies_ends_it_with_its_name() -> None:
    with serving(*SINGLE_STAGE) as (process, address):
        assert address
        services = children(process)
        assert set(services) == {"bagel_dit", "bagel_gateway"}
        os.kill(services["bagel_dit"], signal.SIGKILL)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert re.match(r"bagel: error: stage 0 \(dit\) was killed by SIGKILL", err.splitlines()[-1])
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


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_told_in_one_line_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--device", "cuda"]) == 2
    said = "--device cuda is not there: the driver shows no GPU; use --device cpu, or leave it out"
    assert capsys.readouterr().err == f"bagel: error: {said}\n"


@pytest.mark.parametrize("flags", [("--port", "{}"), ("--port", "0", "--http", "127.0.0.1:{}")])
def test_a_port_in_use_is_told_in_one_line_before_anything_starts(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", *(flag.format(port) for flag in flags)]) == 2
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened on: it is in use" in err and err.count("\n") == 1
    assert f"{flags[-2]}\n" in err


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG, ids=lambda value: str(value))
def test_what_is_wrong_is_told(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAGEL_MODEL", str(GOLDEN / "checkpoint"))
    monkeypatch.chdir(ROOT)
    assert main(["serve", *arguments]) == code
    assert said in capsys.readouterr().err.splitlines()[-1]
