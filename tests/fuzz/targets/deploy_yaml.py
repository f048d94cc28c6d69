"""Deploy files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from bagel.deployment.deploy_file import PACKAGE, load_deploy_config
from bagel.deployment.yaml_files import read_yaml
from bagel.errors import BagelError
from tests.fuzz.target import Target, check_message

FILE = Path(tempfile.gettempdir()) / f"bagel-fuzz-{os.getpid()}.yaml"


def check(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        read = read_yaml(FILE, "mend it")
        # Whatever is read strictly is what a lenient reader finds.
        assert repr(read) == repr(yaml.safe_load(data.decode())), "an independent reading gives other values"
        config = load_deploy_config(FILE)
    except BagelError as error:
        check_message(error, 20_000)
        raise
    finally:
        FILE.unlink()
    assert config.stages and config.source == str(FILE)


def seeds() -> Iterable[bytes]:
    for file in sorted((PACKAGE.parent / "deploy").glob("bagel*.yaml")):
        lines = file.read_text().splitlines()
        yield "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#")).encode()
    yield b"pipeline: bagel\nstages: []\n"
    yield b"a: &a {b: 1}\nc: *a\n"
    yield b"- &a [*a]\n"
    lines = ["&a0 [x, x, x, x, x, x, x, x, x]", *(f"&a{i} [" + f"*a{i - 1}, " * 9 + "]" for i in range(1, 10))]
    yield "".join(f"- {line}\n" for line in lines).encode()


WORDS = b"stages: stage_id: pipeline: parallel_config: base_config: &a *a <<: - ? !!binary !!python/object: 1e999 .nan"
TARGET = Target(check, (BagelError,), seeds, words=(*WORDS.split(), b"2001-01-01", b"\n  "))
