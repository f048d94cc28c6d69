"""What must stay light loads no torch, also where an import is made at run time and import-linter cannot see it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "diffusers"}

# `python -m` of its arguments; when all is done it writes the names of all loaded modules as its last line.
PROBE = """
import atexit, runpy, sys
atexit.register(lambda: print("\\n" + " ".join(sys.modules)))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

# Imports its arguments one after another; a line of each says what is loaded by then that was not before.
ONE_BY_ONE = """
import importlib, sys
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    print(f"{name}:", *set(sys.modules) - before)
"""


def torch_free_modules() -> list[str]:
    """The modules of the import contract `torch-free`."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules: list[str] = next(c["source_modules"] for c in contracts if c["id"] == "torch-free")
    return modules


def fresh_python(*args: str) -> list[str]:
    """The lines that a fresh `python ARGS` prints."""
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_imports_load_no_torch() -> None:
    modules = [*torch_free_modules(), "bagel.cli.generate"]
    told = fresh_python("-c", ONE_BY_ONE, *modules)
    assert [line.partition(":")[0] for line in told] == modules
    assert [line for line in told if HEAVY & set(line.partition(":")[2].split())] == []


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"]], ids=" ".join)
def test_help_loads_no_torch(command: list[str]) -> None:
    *shown, loaded = fresh_python("-c", PROBE, "bagel.cli", *command)
    assert "usage: bagel" in "\n".join(shown)
    assert "bagel.errors" in loaded.split()
    assert not HEAVY & set(loaded.split())
