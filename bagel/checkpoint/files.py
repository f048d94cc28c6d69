"""A checkpoint on disk: its place, its files, and the fingerprint of its content."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.config_files import FOLDER_HOLDS, read_model_config, table_side
from bagel.checkpoint.digest_cache import Stamp
from bagel.checkpoint.headers import Header, TensorInfo, read_header
from bagel.checkpoint.json_files import read_json_file, shown_name
from bagel.errors import CheckpointError

if TYPE_CHECKING:
    from bagel.checkpoint.identity import Identity

EMA, AE = "ema.safetensors", "ae.safetensors"
INDEX = "model.safetensors.index.json"
FILES = ("*.json", "merges.txt", EMA, AE)
CONFIG_FILES = ("config.json", "llm_config.json", "vit_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json")
"""Files that the tokenizers library reads if they exist; the public model has none."""
TEXT_FILES = (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)


@dataclass(frozen=True)
class Checkpoint:
    """A folder laid out like the public ByteDance-Seed/BAGEL-7B-MoT repository, in its state at the first read."""

    folder: Path

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration; the sizes of the position tables come from the weights themselves."""
        self._remember()
        config = read_model_config(self.folder)
        shapes = {name: info.shape for name, info in self.tensors(EMA).items() if name.endswith("pos_embed")}
        sides = {name: table_side(f"{EMA}: {shown_name(name)}", shape) for name, shape in shapes.items()}
        # The tables decide, since config.json of the public checkpoint has carried a wrong size.
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
        """The path of one of its files; raises CheckpointError if the file is missing."""
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {self._instead(file)}")
        return path

    def _instead(self, file: str) -> str:
        """What to do about a missing file; notices weights that are sharded into other files."""
        if file == EMA and (self.folder / INDEX).is_file():
            listed = read_json_file(self.folder / INDEX).get("weight_map")
            parts = sorted({str(part) for part in listed.values()} - {EMA, AE}) if isinstance(listed, dict) else []
            if parts:
                return f"{INDEX} names {len(parts)} other files, like {shown_name(parts[0])}: join them into {EMA}"
        return FOLDER_HOLDS

    def header(self, file: str) -> Header:
        """The header of a safetensors file."""
        return self._headers[file]

    def tensors(self, file: str) -> Mapping[str, TensorInfo]:
        """The tensors of a safetensors file, by name."""
        return self.header(file).tensors

    @cached_property
    def _headers(self) -> Mapping[str, Header]:
        self._remember()
        return {file: read_header(self.path(file)) for file in (EMA, AE)}

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that name this model's content: configuration, tokenizer, and every byte of every tensor.

        Waits until the weights have been read, once per host (`bagel.checkpoint.digest_cache`).
        """
        return self.identity.fingerprint

    @property
    def identity(self) -> Identity:
        """The fingerprint and the digests of the files; raises CheckpointError if they cannot be read."""
        return self._identity.result()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Compute the fingerprint while the block loads weights.

        Raises CheckpointError at the end if a file has changed since this checkpoint was first read: the loaded weights
        would not be those that the fingerprint names.
        """
        _ = self._identity  # starts the thread
        try:
            yield
            self.identity  # noqa: B018
        finally:  # a half-written file fails in many ways, so its change is reported instead of whatever it caused
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise CheckpointError, naming the file, if one has changed since this checkpoint was first read."""
        before = self._stamps
        for name, stamp in _stamps(self.folder).items():
            if stamp != before[name]:
                raise CheckpointError(
                    f"{self.folder / name} changed while the checkpoint was read; let it be written whole, then start "
                    "again"
                )

    @cached_property
    def _identity(self) -> Future[Identity]:
        self._remember()
        future: Future[Identity] = Future()

        def work() -> None:
            from bagel.checkpoint.identity import identify

            try:
                try:
                    identity = identify(self.folder, self.config, (EMA, AE), TEXT_FILES)
                finally:
                    self.check_unchanged()
                future.set_result(identity)
            except BaseException as error:
                future.set_exception(error)

        # A daemon thread, since an interrupted process would wait for a thread of a pool until everything is read.
        Thread(target=work, name="fingerprint", daemon=True).start()
        return future

    def _remember(self) -> None:
        """Note the state of the files before any is read."""
        _ = self._stamps

    @cached_property
    def _stamps(self) -> Mapping[str, Stamp | None]:
        return _stamps(self.folder)


def _stamps(folder: Path) -> dict[str, Stamp | None]:
    return {name: Stamp.of(folder / name) for name in (*CONFIG_FILES, *TEXT_FILES, EMA, AE)}


def find_checkpoint(model: str, *, cached_only: bool = False) -> Checkpoint:
    """Find a checkpoint by its folder, or by its name (owner/name) on the Hugging Face hub.

    Fetches only files that cannot run code; cached_only: fetches nothing. Raises CheckpointError if there is none.
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
        return Checkpoint(Path(snapshot_download(model, allow_patterns=list(FILES), local_files_only=cached_only)))
    except Exception as error:  # the hub's client raises many classes, and the user needs one line
        if cached_only:
            raise CheckpointError(
                f"{model!r} is no folder here and not in the hub's cache, {_hub_cache()}; a service or bagel generate "
                "fetches it, or hf download"
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model!r} is no folder here and cannot be fetched from the hub: {reason}") from None


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)
