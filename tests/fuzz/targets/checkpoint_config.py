"""The configuration files of a checkpoint: the first byte says which one the rest replaces."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.config_files import read_model_config
from bagel.errors import BagelError
from tests.fuzz.target import Target, check_message

GOOD = Path(__file__).parents[2] / "golden" / "checkpoint"
NAMES = ("config.json", "llm_config.json", "vit_config.json")


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with the good files, of this process alone."""
    return tempfile.TemporaryDirectory(prefix=f"bagel-fuzz-{os.getpid()}-")


def check(data: bytes) -> None:
    here, name = Path(folder().name), NAMES[data[0] % len(NAMES)] if data else NAMES[0]
    for each in NAMES:
        (here / each).write_bytes(data[1:] if each == name else (GOOD / each).read_bytes())
    try:
        config = read_model_config(here)
    except BagelError as error:
        check_message(error, 2000)
        raise
    assert isinstance(config, ModelConfig) and isinstance(json.loads(data[1:]), dict)


def seeds() -> Iterable[bytes]:
    for number, name in enumerate(NAMES):
        yield bytes((number,)) + json.dumps(json.loads((GOOD / name).read_bytes()), separators=(",", ":")).encode()


WORDS = b'1e999 NaN -1 0 null [] {} true "hidden_size": "image_transforms": "vae_config":'.split()
TARGET = Target(check, (BagelError,), seeds, words=tuple(WORDS))
