"""The model's shape as a checkpoint's JSON files state it. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from bagel.errors import BagelError, CheckpointError
from bagel.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform
from bagel.model.config import LlmConfig, ModelConfig, VaeConfig, VitConfig


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json, llm_config.json and vit_config.json of a checkpoint folder.

    Raises CheckpointError on a missing file, a missing field or a setting that this network does not have.
    """
    config = _read_json(folder / "config.json")
    llm = _read_json(folder / "llm_config.json")
    vit = _read_json(folder / "vit_config.json")
    _require(folder, config, "interpolate_pos", False)
    _require(folder, config, "connector_act", "gelu_pytorch_tanh")
    _require(folder, vit, "hidden_act", "gelu_pytorch_tanh")
    _require(folder, llm, "hidden_act", "silu")
    _require(folder, llm, "use_sliding_window", False)
    repeated = _section(folder, config, "llm_config")
    _require(folder, repeated, "qk_norm", True)
    _require(folder, repeated, "layer_module", "Qwen2MoTDecoderLayer")
    transforms, sizes = _section(folder, config, "image_transforms"), folder / "config.json"
    return ModelConfig(
        llm=LlmConfig(**_fields(folder / "llm_config.json", llm, LlmConfig)),
        vit=_vit_config(folder / "vit_config.json", vit),
        vae=_vae_config(folder / "config.json", _section(folder, config, "vae_config")),
        latent_patch_size=_number(sizes, "latent_patch_size", config.get("latent_patch_size", 2), int),
        max_latent_size=_number(sizes, "max_latent_size", config.get("max_latent_size", 64), int),
        vit_max_num_patch_per_side=_number(
            sizes, "vit_max_num_patch_per_side", config.get("vit_max_num_patch_per_side", 70), int
        ),
        vae_transform=_transform(folder, transforms, "vae", VAE_TRANSFORM),
        vit_transform=_transform(folder, transforms, "vit", VIT_TRANSFORM),
        default_image_size=_size(folder, config.get("default_image_size", [1024, 1024])),
    )


def table_side(name: str, rows: int) -> int:
    """Side of a square position table with that many rows; raises CheckpointError if it is not square."""
    side = math.isqrt(rows)
    if side * side != rows:
        raise CheckpointError(f"{name} has {rows} rows; a square number was expected")
    return side


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a BAGEL checkpoint folder has it beside ema.safetensors") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}; a JSON object was expected")
    return data


def _section(folder: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within config.json; empty where there is none."""
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder / 'config.json'}: {name} is {section!r}; a JSON object was expected")
    return section


def _fields(path: Path, data: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Values of the dataclass's fields that the file has; raises CheckpointError for a missing required one."""
    found = {}
    for name, spec in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        if name in data:
            found[name] = _number(path, name, data[name], float if spec.type == "float" else int)
        elif not _has_default(spec):
            raise CheckpointError(f"{path} lacks {name!r}")
    return found


def _has_default(spec: Any) -> bool:
    return spec.default is not MISSING or spec.default_factory is not MISSING


def _number(path: Path, name: str, value: Any, kind: type) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not number or kind(value) != value:
        raise CheckpointError(f"{path}: {name} is {value!r}; a positive {kind.__name__} was expected")
    return kind(value)


def _vit_config(path: Path, data: Mapping[str, Any]) -> VitConfig:
    values = _fields(path, data, VitConfig)
    values["num_hidden_layers"] -= 1  # the reference takes the last but one layer's output
    return VitConfig(**values)


def _vae_config(path: Path, data: Mapping[str, Any]) -> VaeConfig:
    plain = {name: value for name, value in data.items() if name != "ch_mult"}
    values = _fields(path, plain, VaeConfig)
    if "ch_mult" in data:
        mults = data["ch_mult"]
        if not isinstance(mults, list) or not mults:
            raise CheckpointError(f"{path}: vae_config.ch_mult is {mults!r}; a list like [1, 2, 4, 4] was expected")
        values["ch_mult"] = tuple(_number(path, "ch_mult", value, int) for value in mults)
    config = VaeConfig(**values)
    if "downsample" in data and data["downsample"] != config.downsample:
        raise CheckpointError(f"{path}: downsample is {data['downsample']}; ch_mult makes it {config.downsample}")
    return config


def _transform(folder: Path, transforms: Mapping[str, Any], name: str, default: ImageTransform) -> ImageTransform:
    if name not in transforms:
        return default
    try:
        return ImageTransform.from_list(transforms[name])
    except BagelError as error:
        raise CheckpointError(f"{folder}/config.json: image_transforms.{name}: {error}") from None


def _size(folder: Path, value: Any) -> tuple[int, int]:
    """default_image_size: one number (a square) or [height, width]."""
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, int) and side >= 16 for side in pair):
        raise CheckpointError(f"{folder}/config.json: default_image_size is {value!r}; [height, width] was expected")
    return pair[0], pair[1]


def _require(folder: Path, data: Mapping[str, Any], name: str, wanted: Any) -> None:
    if name in data and data[name] != wanted:
        raise CheckpointError(f"{folder}: {name} is {data[name]!r}; only {wanted!r} is implemented")
