"""Snippets of README and the pages compile, their commands and flags exist, and some run against bagel-nano."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel.arguments import Parser
from bagel.cli import flags
from bagel.cli.passing import add_service_flags
from bagel.deployment.defaults import NANO_NAME
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.thinker_config import ThinkerConfig
from tests.shared import Borrow

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))
GRPC, HTTP = "127.0.0.1:50051", "127.0.0.1:8000"
RUN = {"rest.md": ("python", "javascript", "bash"), "serve.md": ("python",), "grpc.md": ("python",)}
"""Pages and languages whose snippets run, if they call a gateway at the default addresses."""
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "bash", "console")
LIMIT_S = 240


def snippets(*languages: str) -> Iterator[tuple[str, str, str]]:
    """Page, language and text of each snippet in one of these languages."""
    for page in PAGES:
        for indent, language, text in FENCE.findall(page.read_text()):
            if language in languages:
                yield page.name, language, text.replace(f"\n{indent}", "\n").removeprefix(indent)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command of the pages' shell blocks, as its words; page first."""
    for page, _, text in snippets(*SHELL):
        for line in re.sub(r"\\\n", " ", text).splitlines():
            lexer = shlex.shlex(re.sub(r"^\w*\$ ", "", line), posix=True, punctuation_chars="|;&()<>")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:
                continue  # part of a text over several lines
            while words:
                end = next((i for i, word in enumerate(words) if set(word) <= set("|;&()<>")), len(words))
                command, words = words[:end], words[end + 1 :]
                while command and re.match(r"^\w+=", command[0]):
                    command = command[1:]
                if command:
                    yield page, command


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its words."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name in ("generate", "serve", "eval_nano", "verify", "health", "keys"):
        parser = Parser(prog=name)
        getattr(flags, f"add_{name}_flags")(parser)
        found[f"bagel {name.replace('_', '-')}"] = parser
    add_service_flags(found["bagel serve"])
    return found | {f"python -m {each.MODULE}": each.parser() for each in (GatewayConfig, ThinkerConfig, DitConfig)}


PARSERS = parsers()
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
OURS_ARE = r"bagel|python|make|(deploy|examples)/\S+"
OURS = [(page, words) for page, words in commands() if re.fullmatch(OURS_ARE, words[0])]


def problem(words: list[str]) -> str:
    """What a command names that there is not; empty if nothing."""
    if words[0] == "make":
        return " ".join(word for word in words[1:] if "=" not in word and word not in TARGETS)
    if "/" in words[0]:
        return "" if (ROOT / words[0]).is_file() else words[0]
    prefix = " ".join(words[: 3 if words[0] == "python" else 2])
    if prefix not in PARSERS:
        if words[0] == "python":
            return "" if words[1] != "-m" or importlib.util.find_spec(words[2]) else words[2]
        return "" if len(words) < 2 or words[1].startswith("-") else words[1]
    known = PARSERS[prefix].format_help()
    return " ".join(
        flag for word in words if (flag := word.partition("=")[0]).startswith("--") and not has(known, flag)
    )


def has(help: str, flag: str) -> bool:
    """Whether a parser's --help has the flag."""
    return re.search(rf"(?<![\w-]){flag}(?![\w-])", help) is not None


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in OURS])
def test_the_command_and_its_flags_exist(page: str, words: list[str]) -> None:
    assert not problem(words), words


def test_commands_are_read() -> None:
    assert len(OURS) > 60
    assert problem(["bagel", "generate", "--promts", "x"]) == "--promts" and problem(["make", "dmo"]) == "dmo"
    assert problem(["bagel", "sreve"]) == "sreve" and problem(["python", "-m", "bagel.none"]) == "bagel.none"


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, _, text in snippets("python")])
def test_python_compiles(page: str, text: str) -> None:
    compile(text, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", head)).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        where = (page.parent / file) if file else page
        assert where.exists(), target
        assert not anchor or anchor in anchors(where), target


def calls() -> Iterator[tuple[str, str, str]]:
    for page, language, text in snippets("python", "javascript", "bash"):
        if language in RUN.get(page, ()) and (GRPC in text or HTTP in text):
            yield page, language, text


@pytest.mark.slow
@pytest.mark.parametrize(("page", "language", "text"), list(calls()), ids=[f"{call[0]}-{call[1]}" for call in calls()])
def test_the_snippet_runs(page: str, language: str, text: str, tmp_path: Path, borrow: Borrow) -> None:
    services = borrow("bagel", NANO_NAME)
    programs = {"python": sys.executable, "javascript": shutil.which("node"), "bash": shutil.which("bash")}
    if programs[language] is None or (language == "bash" and shutil.which("jq") is None):
        pytest.skip(f"needs what runs {language}")
    file = tmp_path / ("snippet.mjs" if language == "javascript" else "snippet")
    head = "set -euo pipefail\n" if language == "bash" else ""
    file.write_text(head + text.replace(GRPC, services.address).replace(HTTP, services.http))
    command = [str(programs[language]), str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if page == "rest.md":
        assert "green circle" in done.stdout and (tmp_path / "green.png").stat().st_size > 0


@pytest.mark.slow
def test_the_engine_runs(tmp_path: Path) -> None:
    (text,) = (text for page, _, text in snippets("python") if page == "engine.md")
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0 and (tmp_path / "edit.png").exists(), done.stderr
