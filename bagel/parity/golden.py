"""A folder of recordings: its cases, tables and what its README promises."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.errors import ConfigError
from bagel.images import load_image

TABLES = ("resize", "timesteps", "tokenizer")
"""Tables that every folder has."""
_DISTANCES = "comparison"
_CASE_ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def read_json(path: Path) -> Any:
    """A recorded JSON file; raises ConfigError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Case:
    """One recorded run: `<name>.json`, `<name>.safetensors` and its pictures, in one folder."""

    root: Path
    folder: Path
    name: str

    @cached_property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = read_json(self.folder / f"{self.name}.json")
        return data

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.data.get("settings") or {}
        return settings

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = self.data.get("result") or {}
        return result

    @property
    def pictures(self) -> dict[str, Path]:
        """Recorded pictures by kind: image, vae_input, vit_input."""
        prefix = len(self.name) + 1
        return {path.stem[prefix:]: path for path in sorted(self.folder.glob(f"{self.name}.*.png"))}

    def input_image(self, relative: str) -> Image.Image:
        return load_image(self.root / relative)


@dataclass(frozen=True)
class Golden:
    """A folder laid out as the recordings are: checkpoint/, inputs/, fp32/, tables/, README.md, perhaps bf16/."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("checkpoint", "fp32", "tables", "README.md"):
            if not (self.root / name).exists():
                raise ConfigError(f"{self.root} has no {name}; give a folder with recordings of the reference")

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.root / "checkpoint")

    def cases(self, numerics: str) -> list[Case]:
        """Cases of fp32 or bf16, by name."""
        folder = self.root / numerics
        # By either file, so that a case that has lost one of them fails and is not left out.
        files = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
        return [Case(self.root, folder, name) for name in sorted({path.stem for path in files} - {_DISTANCES})]

    def missing(self) -> list[str]:
        """What the README, the manifest or the bfloat16 distances list and the folder lacks."""
        cases = {f"fp32/{name}.json" for name in self._readme_cases()}
        cases |= {f"bf16/{name}.json" for name in self.bf16_distances}
        files = cases | {f"tables/{name}.json" for name in TABLES} | set(self._manifest())
        return sorted(name for name in files if not (self.root / name).is_file())

    def _readme_cases(self) -> list[str]:
        text = (self.root / "README.md").read_text(encoding="utf-8")
        section = re.search(r"^## 3\. Cases.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        return _CASE_ROW.findall(section[0]) if section else []

    def _manifest(self) -> Mapping[str, Any]:
        path = self.root / "manifest.json"
        files: Mapping[str, Any] = read_json(path)["files"] if path.is_file() else {}
        return files

    def tables(self) -> list[Path]:
        """tables/*.json, by name."""
        return sorted(self.root.glob("tables/*.json"))

    @property
    def bf16_distances(self) -> Mapping[str, Mapping[str, Any]]:
        """Per case and tensor, how far the reference's bfloat16 lies from its float32; empty without a bf16 set."""
        path = self.root / "bf16" / f"{_DISTANCES}.json"
        if not path.is_file():
            return {}
        cases: Mapping[str, Mapping[str, Any]] = read_json(path)["cases"]
        return cases
