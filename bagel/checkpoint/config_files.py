"""Read the model's shape from a checkpoint's JSON files. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from bagel.checkpoint.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from bagel.checkpoint.json_files import read_json_file, shown
from bagel.checkpoint.tensors import PLAIN_WEIGHTS
from bagel.errors import BagelError, CheckpointError
from bagel.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform

# Many times the public model's values, yet quick to check: a damaged layer count must not list billions of tensors.
MOST: Mapping[str, float] = {
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**24,
    "rope_theta": 1e10,
    "rms_norm_eps": 0.1,
    "layer_norm_eps": 0.1,
    "patch_size": 1024,
    "image_size": 2**14,
    "ch": 4096,
    "ch_mult": 64,
    "num_res_blocks": 32,
    "z_channels": 1024,
    "scale_factor": 1e3,
    "shift_factor": 1e3,
    "latent_patch_size": 64,
    "max_latent_size": 4096,
    "vit_max_num_patch_per_side": 4096,
}
"""The largest accepted value of each field."""
FOLDER_HOLDS = "a BAGEL checkpoint folder holds ema.safetensors, ae.safetensors and their JSON files"
RGB = 3
MOST_LEVELS = 8
"""Resolution levels of the autoencoder."""
LARGEST_SIDE = 2**16
"""Largest side, in pixels, of the image transforms and of the default size."""
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which GPTQ, AWQ and ModelOpt describe their quantisation, if not in config.json."""


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json, llm_config.json and vit_config.json of a checkpoint folder.

    Raises CheckpointError, naming the file and the field, for a missing file or field, an impossible value, quantised
    weights, or a setting that this network does not implement.
    """
    config = _read_json(folder / "config.json")
    llm = _read_json(folder / "llm_config.json")
    vit = _read_json(folder / "vit_config.json")
    _refuse_quantised(folder, {"config.json": config, "llm_config.json": llm, "vit_config.json": vit})
    # The network hard-codes these; other values would silently compute another model.
    _require(folder / "config.json", config, "interpolate_pos", False)
    _require(folder / "config.json", config, "connector_act", "gelu_pytorch_tanh")
    _require(folder / "vit_config.json", vit, "hidden_act", "gelu_pytorch_tanh")
    _require(folder / "llm_config.json", llm, "hidden_act", "silu")
    _require(folder / "llm_config.json", llm, "use_sliding_window", False)
    repeated = _section(folder, config, "llm_config")  # config.json repeats the decoder's settings and adds these two
    _require(folder / "config.json", repeated, "qk_norm", True)
    _require(folder / "config.json", repeated, "layer_module", "Qwen2MoTDecoderLayer")
    transforms, main = _section(folder, config, "image_transforms"), folder / "config.json"
    counts = {
        name: _number(main, name, config[name], int)
        for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side")
        if name in config
    }
    with _naming(folder):
        return ModelConfig(
            llm=LlmConfig(**_fields(folder / "llm_config.json", llm, LlmConfig)),
            vit=_vit_config(folder / "vit_config.json", vit),
            vae=_vae_config(main, _section(folder, config, "vae_config")),
            vae_transform=_transform(folder, transforms, "vae", VAE_TRANSFORM),
            vit_transform=_transform(folder, transforms, "vit", VIT_TRANSFORM),
            default_image_size=_size(folder, config.get("default_image_size", [1024, 1024])),
            **counts,
        )


def table_side(name: str, shape: Sequence[int]) -> int:
    """Side of the square position table with this shape; raises CheckpointError if it is not square."""
    rows = shape[0] if shape else 0
    side = math.isqrt(rows)
    if side < 1 or side * side != rows:
        raise CheckpointError(f"{name} has {rows} rows; a square number was expected")
    return side


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Add the folder to an error about values that contradict each other, which names no file."""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if str(folder) in message else f"{folder}: {message}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {FOLDER_HOLDS}")
    return read_json_file(path)


def _refuse_quantised(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse quantised weights, which one of the configurations or a file of their own announces."""
    sections = {f"{file}: {name}": part for file, data in files.items() for name, part in data.items()}
    nested = {
        f"{name}.{key}": part for name, data in sections.items() if isinstance(data, dict) for key, part in data.items()
    }
    for name, part in (sections | nested).items():
        if name.endswith(("quantization_config", "compression_config")) and part not in (None, {}, False):
            how = part.get("quant_method") if isinstance(part, dict) else part
            raise CheckpointError(
                f"{folder / name} says that the weights are quantised ({shown(how)}); {PLAIN_WEIGHTS}"
            )
    for file in QUANTISED_FILES:
        if (folder / file).is_file():
            raise CheckpointError(f"{folder / file} says that the weights are quantised; {PLAIN_WEIGHTS}")


def _section(folder: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within config.json; empty if it is absent."""
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder / 'config.json'}: {name} is {shown(section)}; a JSON object was expected")
    return section


def _fields(path: Path, data: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The file's values for the fields of a dataclass; raises CheckpointError if a required one is missing."""
    found = {}
    for name, spec in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        if name in data:
            found[name] = _number(path, name, data[name], float if spec.type == "float" else int)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise CheckpointError(f"{path} lacks {name!r}")
    return found


def _number(path: Path, name: str, value: Any, kind: type) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not number or (kind is int and value != int(value)):
        raise CheckpointError(f"{path}: {name} is {shown(value)}; a positive {kind.__name__} was expected")
    if value > (most := MOST.get(name, LARGEST_SIDE)):
        raise CheckpointError(f"{path}: {name} is {shown(value)}; at most {most:g} was expected")
    return kind(value)


def _vit_config(path: Path, data: Mapping[str, Any]) -> VitConfig:
    values = _fields(path, data, VitConfig)
    if values["num_hidden_layers"] < 2:
        raise CheckpointError(f"{path}: num_hidden_layers is 1; at least 2 was expected, as the last one never runs")
    _require(path, values, "num_channels", RGB)
    values["num_hidden_layers"] -= 1  # the reference takes the last but one layer's output
    return VitConfig(**values)


def _vae_config(path: Path, data: Mapping[str, Any]) -> VaeConfig:
    plain = {name: value for name, value in data.items() if name != "ch_mult"}
    values = _fields(path, plain, VaeConfig)
    for name in ("in_channels", "out_ch"):
        _require(path, values, name, RGB)
    if "ch_mult" in data:
        mults = data["ch_mult"]
        if not isinstance(mults, list) or not 0 < len(mults) <= MOST_LEVELS:
            raise CheckpointError(
                f"{path}: vae_config.ch_mult is {shown(mults)}; a list like [1, 2, 4, 4] was expected, "
                f"of at most {MOST_LEVELS}"
            )
        values["ch_mult"] = tuple(_number(path, "ch_mult", value, int) for value in mults)
    config = VaeConfig(**values)
    if "downsample" in data and data["downsample"] != config.downsample:
        raise CheckpointError(
            f"{path}: downsample is {shown(data['downsample'])}; ch_mult makes it {config.downsample}"
        )
    return config


def _transform(folder: Path, transforms: Mapping[str, Any], name: str, default: ImageTransform) -> ImageTransform:
    if name not in transforms:
        return default
    where, values = f"{folder}/config.json: image_transforms.{name}", transforms[name]
    if not isinstance(values, list) or not all(type(value) is int and value <= LARGEST_SIDE for value in values):
        raise CheckpointError(f"{where} is {shown(values)}; [max, min, stride] was expected, like [1024, 512, 16]")
    try:
        return ImageTransform.from_list(values)
    except BagelError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _size(folder: Path, value: Any) -> tuple[int, int]:
    """Read default_image_size, which is one number (a square) or [height, width]."""
    pair = [value, value] if isinstance(value, int) else value
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(side) is int for side in pair)
    if not whole or not all(16 <= side <= LARGEST_SIDE for side in pair):
        raise CheckpointError(
            f"{folder}/config.json: default_image_size is {shown(value)}; [height, width] was expected, "
            f"16 to {LARGEST_SIDE} pixels each"
        )
    return pair[0], pair[1]


def _require(path: Path, data: Mapping[str, Any], name: str, wanted: Any) -> None:
    if name in data and data[name] != wanted:
        raise CheckpointError(f"{path}: {name} is {shown(data[name])}; only {wanted!r} is implemented")
