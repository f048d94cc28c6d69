"""Logs of services in files: bounded in size and number, and no reason for a service to stop."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bagel.deployment.process import Service
from bagel.errors import ConfigError
from bagel.telemetry.log_files import LogFolder


def run(tmp_path: Path, code: str, logs: LogFolder) -> None:
    (tmp_path / "talks.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    service = Service("talks-0", "a service", "talks", [], env, logs)
    service.process.wait(60)
    service.end(60)


def test_files_are_bounded_and_the_newest_lines_are_kept(tmp_path: Path) -> None:
    folder = LogFolder(tmp_path / "logs", max_bytes=10_000, files=3)
    run(tmp_path, "for i in range(2000): print('out', i, 'x' * 40)\n", folder)
    files = sorted(folder.folder.iterdir())
    assert [file.name for file in files] == ["talks-0.log", "talks-0.log.1", "talks-0.log.2"]
    assert all(file.stat().st_size <= 10_000 for file in files)
    kept = "".join(file.read_text() for file in reversed(files))
    lines = kept.splitlines()
    assert lines == [f"out {i} {'x' * 40}" for i in range(2000 - len(lines), 2000)]


def test_a_log_that_cannot_be_written_is_told_once_and_stops_no_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LogFolder(tmp_path / "logs")
    folder.folder.mkdir()
    (folder.folder / "talks-0.log").symlink_to("/dev/full")
    run(tmp_path, "for i in range(20_000): print(i, 'x' * 40)\n", folder)
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_folder_whose_log_is_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "talks-0.log").mkdir()
    with pytest.raises(ConfigError, match=r"talks-0.*cannot be written.*log_dir"):
        LogFolder(tmp_path).open("talks-0")
