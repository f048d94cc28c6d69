"""Copies of recorded cases, for a test to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path


def copied(folder: Path, case: str, name: str) -> Path:
    """Copy the case under another name, also in its JSON, whose path is returned."""
    for path in folder.glob(f"{case}.*"):
        shutil.copy(path, folder / f"{name}{path.name.removeprefix(case)}")
    recorded = folder / f"{name}.json"
    recorded.write_text(recorded.read_text().replace(case, name))
    return recorded
