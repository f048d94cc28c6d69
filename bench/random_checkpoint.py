"""A checkpoint of random weights in the public layout, of any size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.files import AE, EMA, INDEX
from bagel.checkpoint.roles import Role
from bagel.model.naming import slots
from bagel.model.weights import empty_model

TEMPLATE = Path(__file__).resolve().parents[1] / "tests" / "golden" / "checkpoint"
"""A checkpoint whose tokenizer and settings are taken; its vocabulary may be a part of the model's."""
COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")
TYPES = {EMA: torch.bfloat16, AE: torch.float32}
STORED = {torch.bfloat16: "BF16", torch.float32: "F32"}
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 980, "width": 980},
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
"""Ours needs none; other programs look for it."""


def make(folder: Path, config: ModelConfig, device: torch.device) -> None:
    """Write a checkpoint of this shape. Its values are made on `device`, scaled so that activations stay near one."""
    folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(config, Role.FULL, dtype=torch.bfloat16, device="meta")
    listed: dict[str, dict[str, tuple[int, ...]]] = {EMA: {}, AE: {}}
    for slot in slots(model):
        listed[slot.file][slot.name] = slot.shape
    generator = torch.Generator(device=device).manual_seed(0)
    for file, shapes in listed.items():
        dtype = TYPES[file]
        _write(folder / file, shapes, dtype, (_values(name, shapes[name], dtype, generator) for name in shapes))
    for name in COPIED:
        shutil.copy(TEMPLATE / name, folder)
    for name, settings in _settings(config).items():
        (folder / name).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    # With the autoencoder's: vllm-omni loads no tensor that the index does not list.
    weights = {name: file for file, shapes in listed.items() for name in shapes}
    size = sum(prod(shape) * TYPES[file].itemsize for file, shapes in listed.items() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _values(name: str, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.empty(tuple(shape), dtype=dtype, device=generator.device)
    if len(shape) > 1:
        return values.normal_(0.0, prod(shape[1:]) ** -0.5, generator=generator)
    return values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def _write(path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, values: Iterator[Tensor]) -> None:
    """A safetensors file, tensor by tensor: the library's writer wants all of them in memory."""
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    # Spaces up to a multiple of 8, as the format has it, so that the data are aligned.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in values:
            file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)


def _settings(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The configuration files, by their names."""
    whole = json.loads((TEMPLATE / "config.json").read_text(encoding="utf-8"))
    llm = {
        "hidden_size": config.llm.hidden_size,
        "intermediate_size": config.llm.intermediate_size,
        "max_window_layers": config.llm.num_hidden_layers,
        "num_attention_heads": config.llm.num_attention_heads,
        "num_hidden_layers": config.llm.num_hidden_layers,
        "num_key_value_heads": config.llm.num_key_value_heads,
        "vocab_size": config.llm.vocab_size,
    }
    vit = {
        "hidden_size": config.vit.hidden_size,
        "intermediate_size": config.vit.intermediate_size,
        "num_attention_heads": config.vit.num_attention_heads,
        # The public file counts a last layer that is never run.
        "num_hidden_layers": config.vit.num_hidden_layers + 1,
    }
    whole["llm_config"] |= llm
    whole["vit_config"] |= vit
    whole["vae_config"] |= {"ch": config.vae.ch, "ch_mult": list(config.vae.ch_mult)}
    parts = {
        f"{part}_config.json": json.loads((TEMPLATE / f"{part}_config.json").read_text(encoding="utf-8")) | changed
        for part, changed in (("llm", llm), ("vit", vit))
    }
    return {"config.json": whole, **parts, "preprocessor_config.json": PREPROCESSOR}
