"""The mistakes of docs/troubleshooting.md, made: each gives the line that the page says, and exit code 1 or 2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
MISTAKES = re.findall(r"```console\n +\$ (.+)\n +(.+)\n +```", PAGE)


def test_all_are_read() -> None:
    assert len(MISTAKES) == PAGE.count("```console") == 9


@pytest.mark.parametrize(("command", "line"), MISTAKES)
def test_the_line_is_said(command: str, line: str, tmp_path: Path) -> None:
    command = re.sub(r"\bbagel (?=generate|serve|verify)", f"{sys.executable} -m bagel.cli ", command)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    said = (done.stdout + done.stderr).splitlines()
    begun, cut, _ = line.partition("…")
    assert any(each == line or (cut and each.startswith(begun)) for each in said), said
    assert done.returncode in (1, 2)
