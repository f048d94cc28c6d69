"""Where the ranks of one host meet: a file in a folder of its own for each start. No torch here.

A port that is free now may be taken when the ranks come; a new folder is nobody else's.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


class Rendezvous:
    """A meeting place, until `close`; ranks form further groups by it for as long as they run."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bagel-ranks-"))

    @property
    def address(self) -> str:
        """As torch.distributed's init_method."""
        return (self._folder / "meet").as_uri()

    def close(self) -> None:
        """Remove it; nothing if it is gone."""
        shutil.rmtree(self._folder, ignore_errors=True)


def clear(address: str) -> None:
    """Remove a meeting place by its address, where the server cannot any more."""
    if address.startswith("file:"):
        shutil.rmtree(Path(address.removeprefix("file://")).parent, ignore_errors=True)
