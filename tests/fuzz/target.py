"""What a fuzz target is, and the ones that there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
TARGETS = Path(__file__).parent / "targets"


@dataclass(frozen=True)
class Target:
    """One parser under fuzzing.

    check: reads the bytes and asserts what must hold: it raises the parser's documented `errors` and nothing else, and
    compares what is accepted with an independent reading. seeds: inputs to begin from, made by code; words: pieces of
    the format, for mutations; longest: bytes of an input.
    """

    check: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], Iterable[bytes]]
    words: tuple[bytes, ...] = ()
    longest: int = 4096

    def run(self, data: bytes) -> bool:
        """Whether the bytes were accepted; whatever is raised here is a finding."""
        try:
            self.check(data)
        except self.errors:
            return False
        return True


def check_message(error: Exception, most: int = 1000) -> None:
    """An error's text is one line, and no flood."""
    assert "\n" not in str(error) and len(str(error)) < most, repr(error)


def names() -> list[str]:
    """All targets."""
    return sorted(file.stem for file in TARGETS.glob("*.py") if file.stem != "__init__")


def load(name: str) -> Target:
    """The target in the file of that name."""
    target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    assert isinstance(target, Target)
    return target


def corpus(name: str) -> list[bytes]:
    """The target's seeds and the inputs that are committed for it."""
    files = sorted((CORPUS / name).glob("*"))
    return [*load(name).seeds(), *(file.read_bytes() for file in files)]
