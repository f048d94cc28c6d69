"""The command as a process: signals, pipes, terminals, exit codes. The engine computes nothing."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GOLDEN

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

ROOT = Path(__file__).parents[2]
LIMIT_S = 60


def start(*arguments: str, wait: str = "", **streams: Any) -> subprocess.Popen[str]:
    """`bagel generate ARGUMENTS` in a process of its own; wait: where it never gets on."""
    command = [sys.executable, "-m", "tests.cli.fake_cli", "generate", "--prompts", "a [red] cube", *arguments]
    environment = os.environ | {"BAGEL_MODEL": str(GOLDEN / "checkpoint"), "WAIT": wait, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


@pytest.mark.parametrize(("wait", "last_line"), [("load", "loading"), ("torch", "loading"), ("draw", "stage 0")])
def test_ctrl_c_ends_in_one_line(wait: str, last_line: str, tmp_path: Path) -> None:
    process = start("--output", str(tmp_path), wait=wait)
    read_until(process, last_line)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "bagel: interrupted\n")


@pytest.mark.parametrize("wait", ["load", "torch"])
def test_slow_load_ends_with_the_stages_name(wait: str, tmp_path: Path) -> None:
    began = time.monotonic()
    code, _, err = finish(start("--output", str(tmp_path), "--init-timeout", "1", wait=wait))
    assert code == 1, err
    assert err.splitlines()[-1].startswith("bagel: error: stage 0 (dit) was not ready after 1 s")
    assert time.monotonic() - began < LIMIT_S / 2


def test_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("--output", str(tmp_path), stdout=writing)
    os.close(writing)
    code, _, err = finish(process)
    assert code == 141
    assert "Traceback" not in err
    assert "Exception" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        code, _, err = finish(start("--output", str(tmp_path), stdout=full.fileno()))
    assert code == 1
    assert err.splitlines()[-1] == "bagel: error: a read or write failed: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_picture_on_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    """A limit of file sizes stands for the full disk, which only root could mount. What is half written goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = start("--output", str(tmp_path), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard)))
    code, out, err = finish(process)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"bagel: error: cannot write '.*\.png': File too large; make room.*", err.splitlines()[-1])
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_path_that_stdout_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, _ = finish(start("--output", str(tmp_path / "é"), "--seed", "1"))
    assert (code, out) == (0, f"{tmp_path}/\\xe9/a-red-cube_seed1.png\n")


def test_terminal_shows_bars_and_keeps_what_is_written(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    arguments = ["--prompts", "two", "three", "--steps", "4", "--think", "--seed", "1", "--output", str(tmp_path)]
    process = start(*arguments, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # Linux's end of file on a terminal
        pass
    assert process.wait(LIMIT_S) == 0
    os.close(ours)
    written = shown.decode()
    assert re.search(r"picture 1 of 3, 'a \[red\] cube'.*3/3", written)
    dim = "\x1b[2m"
    assert f"{dim}picture 1 of 3, 'a [red] cube': <think> a cube </think>" in written
    paths = [f"{tmp_path}/a-red-cube_seed1.png", f"{tmp_path}/two_seed1.png", f"{tmp_path}/three_seed1.png"]
    left = screen_after(written)
    assert [line for line in left if line.endswith(".png")] == paths
    assert sum("<think> a cube </think>" in line for line in left) == 3
    assert not [line for line in left if "3/3" in line]


def screen_after(written: str) -> list[str]:
    """The lines of a terminal after what was written to it; knows what progress bars use."""
    lines, row, column = [""], 0, 0
    for sequence in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)", written):
        count, command, control, text = sequence.groups()
        if command == "A":
            row -= int(count or 1)
        elif command == "K":
            lines[row] = ""
        elif control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return lines
