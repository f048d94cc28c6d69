"""A checkpoint on disk: where it is, what its files hold, and the fingerprint of its content."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bagel.errors import CheckpointError
from bagel.model.config import ModelConfig
from bagel.model.config_files import read_model_config, table_side

EMA, AE = "ema.safetensors", "ae.safetensors"
FILES = ("*.json", "merges.txt", EMA, AE)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a safetensors header; begin and end are offsets into the file's data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder laid out as the public ByteDance-Seed/BAGEL-7B-MoT repository."""

    folder: Path

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration, with the sizes of the position tables taken from the weights themselves."""
        config = read_model_config(self.folder)
        rows = {name: info.shape[0] for name, info in self.tensors(EMA).items() if name.endswith("pos_embed")}
        sides = {name: table_side(f"{EMA}: {name}", count) for name, count in rows.items()}
        config = replace(
            config,
            max_latent_size=sides.get("latent_pos_embed.pos_embed", config.max_latent_size),
            vit_max_num_patch_per_side=sides.get("vit_pos_embed.pos_embed", config.vit_max_num_patch_per_side),
        )
        if max(config.default_image_size) > config.max_image_size:
            raise CheckpointError(
                f"{self.folder}: default_image_size is {list(config.default_image_size)}; "
                f"the latent position table ends at {config.max_image_size}"
            )
        return config

    def path(self, file: str) -> Path:
        """Path of one of its files; raises CheckpointError if it is missing."""
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; a BAGEL checkpoint folder holds {EMA}, {AE} and their JSON files"
            )
        return path

    def tensors(self, file: str) -> dict[str, TensorInfo]:
        """The header of a safetensors file."""
        return self._headers[file][0]

    @cached_property
    def _headers(self) -> Mapping[str, tuple[dict[str, TensorInfo], int]]:
        return {file: read_header(self.path(file)) for file in (EMA, AE)}

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that name this model's content.

        BLAKE2b over the configuration, the tokenizer, the image transforms, and of every tensor its name, type, shape
        and first and last 4 KiB, so that another fine-tune is another model and 29 GB need not be read.
        """
        digest = blake2b(digest_size=16, person=b"bagel-model")
        digest.update(repr(self.config).encode())
        for name in TOKENIZER_FILES:
            path = self.folder / name
            digest.update(f"{name}:".encode() + (blake2b(path.read_bytes()).digest() if path.is_file() else b"-"))
        for file in (EMA, AE):
            _hash_tensors(digest, self.path(file), *self._headers[file])
        return digest.digest()


def _hash_tensors(digest: Any, path: Path, tensors: Mapping[str, TensorInfo], data_start: int) -> None:
    with path.open("rb") as stream:
        for name, info in sorted(tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape};".encode())
            size = info.end - info.begin
            for offset in (info.begin, max(info.begin, info.end - SAMPLE_BYTES)):
                stream.seek(data_start + offset)
                digest.update(stream.read(min(SAMPLE_BYTES, size)))


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Tensors of a safetensors file and where their data starts; raises CheckpointError on a malformed file."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > os.path.getsize(path):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        infos = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    end = 8 + length + max((info.end for info in infos.values()), default=0)
    if os.path.getsize(path) < end:
        raise CheckpointError(f"{path} is cut short: {os.path.getsize(path)} of {end} bytes; download it again")
    return infos, 8 + length


def find_checkpoint(model: str) -> Checkpoint:
    """A checkpoint from a folder, or from the Hugging Face hub by name (owner/name); only safe files are fetched.

    Raises CheckpointError if there is neither.
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return Checkpoint(folder)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no checkpoint folder {model!r}; give a folder or a hub name like ByteDance-Seed/BAGEL-7B-MoT"
        )
    from huggingface_hub import snapshot_download

    try:
        return Checkpoint(Path(snapshot_download(model, allow_patterns=list(FILES))))
    except Exception as error:  # the hub's client raises many kinds; the user needs one line
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model!r} is no folder here and cannot be fetched from the hub: {reason}") from None
