"""Which model it is where the user names none, and what it is called. No torch here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import bagel
from bagel.checkpoint.files import Checkpoint, find_checkpoint
from bagel.errors import CheckpointError, ConfigError

NANO_NAME = "bagel-nano"
NANO_FOLDERS = tuple(Path(bagel.__file__).resolve().parents[up] / "models" / "nano" for up in (0, 1))
"""Where the shipped model is: in an installed wheel, in a checkout."""
NANO_NOTE = f"no --model given: using {NANO_NAME}, a small model that knows coloured shapes on plain backgrounds"


def named_model(name: str | None) -> str | None:
    """The model that the user names: here, or as BAGEL_MODEL in the environment."""
    return name or os.environ.get("BAGEL_MODEL", "").strip() or None


def find_model(name: str | None, *, cached_only: bool = False) -> tuple[str, Checkpoint]:
    """A model and what to call it: the one named, BAGEL_MODEL's, or the shipped one, also called bagel-nano.

    cached_only: of a name on the hub, what is on this machine. Raises CheckpointError if it is not there.
    """
    name = named_model(name) or NANO_NAME
    if name == NANO_NAME:
        return name, find_checkpoint(str(_shipped_model()))
    with missing_install_named():  # a name on the hub needs its client
        return name, find_checkpoint(name, cached_only=cached_only)


def model_label(name: str) -> str:
    """What a picture's file calls a model: its name on the hub, or its folder's name, but no path of this machine.

    In the hub's cache the folder is models--OWNER--NAME/snapshots/REVISION.
    """
    path = Path(name)
    if path in NANO_FOLDERS:
        return NANO_NAME
    if cached := [part for part in path.parts if part.startswith("models--")]:
        return cached[-1].removeprefix("models--").replace("--", "/")
    return path.name if path.is_dir() or path.is_absolute() else name


def _shipped_model() -> Path:
    for folder in NANO_FOLDERS:
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"no model is given, and the shipped {NANO_NAME} is not in {NANO_FOLDERS[0]}; install again, "
        "use --model FOLDER, or set BAGEL_MODEL in the environment"
    )


def how_to_install(extra: str) -> str:
    """The command that adds an extra of this package, which is on no index: in a checkout, or from a wheel."""
    wheel = f"dist/bagel_serving-{bagel.__version__}-py3-none-any.whl"
    return f"pip install '.[{extra}]' in a checkout, or pip install '{wheel}[{extra}]' after make wheel there"


@contextlib.contextmanager
def missing_install_named(extra: str = "engine", what: str = "the model cannot run in this process") -> Iterator[None]:
    """What only an extra needs is not part of the smallest installation; ConfigError says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what}: {error}; {how_to_install(extra)}") from error
