"""API keys on the command line: `bagel keys`, a key for `--endpoint`, `bagel serve --api-keys`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from bagel.cli import main
from bagel.cli.endpoint import api_key_of
from bagel.client import Client
from bagel.errors import Unauthenticated
from bagel.rpc.api_keys import key_line, new_key, read_keys
from tests.cli.test_serve import LIMIT_S, ROOT, SINGLE_STAGE, serving
from tests.client.test_client import serving as gateway_in_a_thread
from tests.gateway_stages import Deployment
from tests.shared import Borrow

KEY = new_key()
ASKED = ["--prompts", "a red cube", "--steps", "4", "--height", "64", "--width", "64"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(key_line("alice", KEY))
    return path


@pytest.fixture
def gateway(keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """One that asks for keys."""
    monkeypatch.delenv("BAGEL_API_KEY", raising=False)
    yield from gateway_in_a_thread(api_keys=keys)


def test_a_new_key_is_printed_with_the_line_that_makes_it_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "new", "alice"]) == 0
    key, line = capsys.readouterr().out.splitlines()
    (tmp_path / "keys").write_text(line + "\n")
    ring, _ = read_keys(tmp_path / "keys")
    assert ring.name_of(key.encode()) == "alice"
    assert main(["keys", "new", "alice"]) == 0
    assert capsys.readouterr().out.splitlines()[0] != key


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_key_files_may_begin_with_the_mark_that_editors_write(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "ring").write_text(key_line("alice", KEY) + "\n", encoding=encoding)
    assert read_keys(tmp_path / "ring")[0].name_of(KEY.encode()) == "alice"
    (tmp_path / "key").write_text(KEY + "\r\n", encoding=encoding)
    assert api_key_of(Namespace(api_key_file=str(tmp_path / "key"))) == KEY


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("keys", "required: action, NAME"),
        ("keys new", "required: NAME"),
        ("keys list x", "invalid choice: 'list'"),
        ("keys new a=b", "'a=b' is no name of a key"),
        ("generate --prompts x --api-key-file k", "--api-key-file: only for a running gateway; add --endpoint"),
        ("eval-nano --trusted-network", "--trusted-network: only for a running gateway; add --endpoint"),
        ("generate --prompts x --endpoint 127.0.0.1:1 --api-key-file none", "'none' cannot be read: No such file"),
        ("generate --prompts x --endpoint 127.0.0.1:1 --api-key-file empty", "'empty' is empty"),
        ("generate --prompts x --endpoint gateway:1 --api-key-file key", "would go to gateway:1 without TLS"),
        ("serve --api-keys none", "'none' cannot be read"),
        ("serve --api-keys key", "key: line 1 is not NAME sha256:HEX"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("key").write_text(KEY)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bagel: error:") and told in error
    assert KEY not in error


def test_generate_shows_the_key_of_a_file_or_of_the_environment(
    gateway: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "--endpoint", gateway.target, *ASKED, "--output", str(tmp_path)]
    assert main(asked) == 2
    assert "--api-key-file or BAGEL_API_KEY" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert main([*asked, "--api-key-file", str(tmp_path / "key")]) == 0
    monkeypatch.setenv("BAGEL_API_KEY", KEY)
    assert main(asked) == 0
    (tmp_path / "key").write_text(new_key())
    assert main([*asked, "--api-key-file", str(tmp_path / "key")]) == 2, "the flag comes first"
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_eval_nano_shows_the_key_and_health_needs_none(
    gateway: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["eval-nano", "--endpoint", gateway.target, "--count", "1", "--rows", "think", "--output", str(tmp_path)]
    assert main(asked) == 2
    assert "BAGEL_API_KEY" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("BAGEL_API_KEY", KEY)
    assert main(asked) == 0
    monkeypatch.delenv("BAGEL_API_KEY")
    assert main(["health", "--endpoint", gateway.target]) == 0


@pytest.mark.slow
def test_serve_asks_for_keys_on_both_ports_and_says_how_to_show_one(keys: Path, tmp_path: Path) -> None:
    single = (*SINGLE_STAGE, "--log-dir", str(tmp_path), "--http", "127.0.0.1:0")
    with serving(*single, "--api-keys", str(keys)) as (process, address):
        with Client(address) as client, pytest.raises(Unauthenticated):
            client.generate("a", modality="text2text", max_tokens=3, timeout=LIMIT_S)
        with Client(address, api_key=KEY) as client:
            assert client.generate("a", modality="text2text", max_tokens=3, timeout=LIMIT_S).text
        process.terminate()
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert f"--endpoint {address} --api-key-file FILE" in err
    url = next(line for line in err.splitlines() if "the OpenAI API is at" in line).rpartition(" ")[2]
    assert url.startswith("http://127.0.0.1:")
    assert KEY not in err + "".join(log.read_text() for log in tmp_path.glob("*.log"))


@pytest.mark.slow
def test_services_for_ones_own_use_ask_for_no_keys_whatever_the_environment_says(
    borrow: Borrow,
) -> None:
    """Those that tests share were started with BAGEL_API_KEYS_FILE set."""
    assert borrow("bagel_single_stage").omni.generate("a", modality="text2text", max_tokens=3)[0].text


def test_a_gateway_on_all_interfaces_warns_of_keys_in_plaintext(keys: Path) -> None:
    command = [sys.executable, "-m", "bagel_gateway", "--listen", "0.0.0.0:0", "--http", "127.0.0.1:0"]
    command += ["--thinker", "thinker-0=127.0.0.1:1", "--dit", "dit-0=127.0.0.1:2"]
    env = os.environ | {"BAGEL_API_KEYS_FILE": str(keys)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **streams) as process:  # type: ignore[call-overload]
        try:
            http = json.loads(process.stdout.readline())["http"]
            for path, status in (("healthz", 200), ("metrics", 401)):
                assert status_of(http, path) == status
        finally:
            process.terminate()
            _, err = process.communicate(timeout=LIMIT_S)
    events = {line["event"]: line for line in map(json.loads, err.splitlines())}
    assert events["API keys come in plaintext"]["level"] == "warning"
    assert events["configuration"]["api_keys"] == str(keys)


def status_of(address: str, path: str) -> int:
    """What a GET is answered with; the process may say its address a moment before it listens there."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        connection = HTTPConnection(address, timeout=LIMIT_S)
        try:
            connection.request("GET", f"/{path}")
            return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finally:
            connection.close()
