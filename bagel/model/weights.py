"""Filling a model: from a checkpoint, or with random weights in place.

python -m bagel.model.weights FOLDER          what each role would load of a checkpoint, and its bytes
python -m bagel.model.weights tensors.json    the same from a list of names and shapes, for BAGEL-7B-MoT
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bagel.arguments import OnceParser
from bagel.checkpoint.config import BAGEL_7B_MOT, ModelConfig
from bagel.checkpoint.files import AE, EMA, Checkpoint
from bagel.checkpoint.headers import TensorInfo
from bagel.checkpoint.roles import Role
from bagel.checkpoint.tensors import check_plain, few
from bagel.errors import BagelError, CheckpointError
from bagel.model.backend import choose_backend
from bagel.model.bagel import Bagel
from bagel.model.flow import TimestepEmbedder
from bagel.model.layers import RMSNorm
from bagel.model.naming import Slot, slots
from bagel.model.vae import Vae

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]


def load_model(
    checkpoint: Checkpoint,
    role: Role = Role.FULL,
    *,
    delimiter_ids: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Bagel:
    """The model of a role, its weights read from the checkpoint.

    dtype: of the decoder, ViT and embeddings; norms and the small modules around latents are always float32.

    delimiter_ids: ids of the image delimiters, start and end; role denoise keeps only their rows of the embedding.
    Raises CheckpointError naming every missing, misshapen or quantised tensor (the first few of many), before anything
    is allocated.
    """
    model = _unplaced_model(checkpoint.config, role, dtype, delimiter_ids)
    check_role(checkpoint, model)
    model = _place(model, device)
    needed = list(slots(model))
    for file in (EMA, AE):
        fill(checkpoint.path(file), [slot for slot in needed if slot.file == file], delimiter_ids)
    return model.eval()


def empty_model(
    config: ModelConfig,
    role: Role,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    delimiter_ids: tuple[int, int] = (0, 1),
) -> Bagel:
    """A model without values, on any device (meta takes no memory)."""
    return _place(_unplaced_model(config, role, dtype, delimiter_ids), device)


def _unplaced_model(config: ModelConfig, role: Role, dtype: torch.dtype, delimiter_ids: tuple[int, int]) -> Bagel:
    """A model that has shapes and types alone."""
    with torch.device("meta"):
        model = Bagel(config, role, delimiter_ids)
    settle_types(model, dtype)
    return model


def _place(model: Bagel, device: torch.device | str) -> Bagel:
    """Give a model memory on a device."""
    model.to_empty(device=device)
    model.language_model.rotary.to(torch.float32).reset()
    model.language_model.backend = choose_backend(model.device, model.dtype)
    return model


def settle_types(model: Bagel, dtype: torch.dtype) -> None:
    """Matrix products, embeddings and K/V in dtype; norms and the small modules around latents in float32."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, RMSNorm | nn.LayerNorm | TimestepEmbedder | Vae) or module in (
            model.vae2llm,
            model.llm2vae,
        ):
            module.to(torch.float32)
    model.requires_grad_(False)


def random_model(
    config: ModelConfig, role: Role, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Bagel:
    """A model with random weights made in place, scaled so that activations stay of order one; for benches."""
    model = empty_model(config, role, dtype=dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name.split(".")[-2] and name.endswith("weight"):
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def check_role(checkpoint: Checkpoint, model: Bagel) -> None:
    """Raise CheckpointError unless the checkpoint's files have what this model needs, and only what BAGEL has."""
    files = {file: checkpoint.tensors(file) for file in (EMA, AE)}
    check_known(files, checkpoint.config, str(checkpoint.folder))
    check_tensors({file: shapes(checkpoint, file) for file in files}, list(slots(model)), str(checkpoint.folder))


def check_known(files: Mapping[str, Mapping[str, TensorInfo]], config: ModelConfig, where: str) -> None:
    """Raise CheckpointError for quantised weights and for tensors that no role uses."""
    idle = check_plain(files, known_names(config), config, where)
    if idle:
        logger.info("%s holds tensors that are left alone: %s", where, few(idle))


def check_tensors(files: Mapping[str, Shapes], needed: Sequence[Slot], where: str) -> None:
    """Compare what a model needs with what the files hold; raises CheckpointError with every difference."""
    problems = []
    for slot in needed:
        found = files[slot.file].get(slot.name)
        if found is None:
            problems.append(f"{slot.file} lacks {slot.name} {list(slot.shape)}")
        elif tuple(found) != slot.shape:
            problems.append(f"{slot.file}: {slot.name} is {list(found)}, the configuration makes it {list(slot.shape)}")
    if problems:
        raise CheckpointError(f"{where} does not fit its configuration: {few(problems)}")


def shapes(checkpoint: Checkpoint, file: str) -> Shapes:
    """Names and shapes of a file's tensors."""
    return {name: info.shape for name, info in checkpoint.tensors(file).items()}


def known_names(config: ModelConfig) -> set[str]:
    """The name of every tensor that some role uses."""
    return {slot.name for slot in slots(_unplaced_model(config, Role.FULL, torch.bfloat16, (0, 1)))}


def _meta(config: ModelConfig, role: Role, dtype: torch.dtype = torch.bfloat16) -> Bagel:
    return empty_model(config, role, dtype=dtype, device="meta")


def fill(path: Path, needed: Sequence[Slot], delimiter_ids: tuple[int, int]) -> None:
    """Read slots of one file into their parameters."""
    if not needed:
        return
    try:
        with safe_open(path, framework="pt") as file:
            for slot in needed:
                slot.target.copy_(_read(file, slot, delimiter_ids).view(slot.target.shape))
    except (OSError, SafetensorError) as error:  # what its header says has been checked; this is a disk, or a change
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _read(file: safe_open, slot: Slot, delimiter_ids: tuple[int, int]) -> Tensor:
    if not slot.embedding or slot.stop == slot.shape[0]:
        tensor: Tensor = file.get_tensor(slot.name)
    else:
        rows = file.get_slice(slot.name)
        tensor = torch.cat([rows[token : token + 1] for token in delimiter_ids])
    return tensor


def inventory(files: Mapping[str, Shapes], config: ModelConfig, where: str) -> list[str]:
    """One line per role: tensors, parameters and bytes in bfloat16, after checking that the files fit."""
    lines = []
    for role in Role:
        model = _meta(config, role)
        needed = list(slots(model))
        check_tensors(files, needed, where)
        count = sum(slot.target.numel() for slot in needed)
        size = sum(slot.nbytes for slot in needed)
        lines.append(
            f"{role:<11} {len(needed):>5} tensors {count / 1e9:>8.3f} B parameters"
            f" {size:>15,} bytes {size / 2**30:>7.2f} GiB"
        )
    unknown = sorted({name for listed in files.values() for name in listed} - known_names(config))
    if unknown:
        raise CheckpointError(f"{where} holds tensors that BAGEL does not have: {few(unknown)}")
    return lines


def _listed(path: Path) -> dict[str, Shapes]:
    """Names and shapes by file, from a JSON list of them."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {file: {name: tuple(shape) for name, shape in listed[file].items()} for file in (EMA, AE)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no checkpoint folder and no list of tensors: {error!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the inventory of a checkpoint or of a list of tensors; the exit code."""
    parser = OnceParser(prog="python -m bagel.model.weights", description="What each role loads, and its bytes.")
    parser.add_argument("source", type=Path, help="a checkpoint folder, or tensors.json of BAGEL-7B-MoT")
    source: Path = parser.parse_args(argv).source
    try:
        if source.is_dir():
            checkpoint = Checkpoint(source)
            files, config = {file: shapes(checkpoint, file) for file in (EMA, AE)}, checkpoint.config
        else:
            files, config = _listed(source), BAGEL_7B_MOT
        print("\n".join(inventory(files, config, str(source))))
    except BagelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
