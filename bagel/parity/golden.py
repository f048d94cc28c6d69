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

from bagel.errors import ConfigError
from bagel.images import load_image
from bagel.model.checkpoint import Checkpoint

_CASE_ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """One recorded run: `<name>.json`, `<name>.safetensors` and its pictures, in one folder."""

    root: Path
    folder: Path
    name: str

    @cached_property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))
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
        names = sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".safetensors").exists())
        return [Case(self.root, folder, name) for name in names]

    @cached_property
    def promised_cases(self) -> frozenset[str]:
        """Names in the case table of the README, and in the manifest if there is one."""
        text = (self.root / "README.md").read_text(encoding="utf-8")
        section = re.search(r"^## 3\. Cases.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        names = set(_CASE_ROW.findall(section[0])) if section else set()
        manifest = self.root / "manifest.json"
        if manifest.is_file():
            files = json.loads(manifest.read_text())["files"]
            names |= {Path(file).stem for file in files if re.fullmatch(r"fp32/[^/]+\.json", file)}
        return frozenset(names)

    def missing_files(self) -> list[str]:
        """Files that the manifest lists and the folder lacks; none without a manifest."""
        manifest = self.root / "manifest.json"
        if not manifest.is_file():
            return []
        return sorted(name for name in json.loads(manifest.read_text())["files"] if not (self.root / name).is_file())

    def tables(self) -> dict[str, Any]:
        """Contents of tables/*.json by name."""
        return {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.root.glob("tables/*.json"))
        }

    @property
    def bf16_distances(self) -> Mapping[str, Mapping[str, Any]]:
        """Per case and tensor, how far the reference's bfloat16 lies from its float32; empty without a bf16 set."""
        path = self.root / "bf16" / "comparison.json"
        if not path.is_file():
            return {}
        cases: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text())["cases"]
        return cases
