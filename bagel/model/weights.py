"""Filling a model: from a checkpoint, or with random weights in place.

python -m bagel.model.weights FOLDER          what each role loads of a checkpoint, and its bytes
python -m bagel.model.weights tensors.json    the same from a list of names and shapes of BAGEL-7B-MoT
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bagel.arguments import OnceParser
from bagel.checkpoint.config import BAGEL_7B_MOT, ModelConfig
from bagel.checkpoint.files import AE, EMA, Checkpoint
from bagel.checkpoint.headers import TensorInfo
from bagel.checkpoint.roles import Role
from bagel.checkpoint.slices import SliceReader
from bagel.checkpoint.tensors import check_plain, few
from bagel.errors import BagelError, CheckpointError, NotSupported
from bagel.model.attention_backends import AUTO
from bagel.model.backend import choose_backend, launched_in_order, launched_one_by_one
from bagel.model.bagel import Bagel
from bagel.model.divided import divided_stream
from bagel.model.fp8 import check_fp8, quantise_into
from bagel.model.kernels import TORCH
from bagel.model.layer_stream import LayerStream
from bagel.model.linear import Fp8Linear, LinearFactory, Quantization
from bagel.model.mot import EXPERTS, MoTDecoder
from bagel.model.naming import Slot, kept, slots
from bagel.model.offload import host_stream
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.parallel.hsdp import gather_once, shard
from bagel.parallel.peer_memory import readable

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
STORED_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""PyTorch's types of the weights that a checkpoint may hold (bagel.checkpoint.tensors)."""


def load_model(
    checkpoint: Checkpoint,
    role: Role = Role.FULL,
    *,
    delimiter_ids: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    groups: Groups = UNDIVIDED,
    attention: str = AUTO,
    eager: bool = False,
    quantization: Quantization | None = None,
    offload: bool = False,
) -> Bagel:
    """The model of a role, its weights read from the checkpoint.

    dtype: of the decoder, ViT and embeddings; norms and the small modules around latents are always float32.
    delimiter_ids: ids of the image delimiters, start and end; role denoise keeps only their rows of the embedding.
    groups: of the rank whose share is loaded; ranks that divide the weights (`weights`) call this together. attention,
    eager: as `choose_backend` takes them; quantization: of the decoder's weights, as they are read; offload: keep those
    of its layers in the host's memory (bagel.model.offload). Raises ConfigError for a model that does not divide among
    its mesh's ranks, and CheckpointError naming every missing, misshapen or quantised tensor (the first few of many),
    both before anything is allocated; ConfigError too for attention or a quantization that cannot run there,
    NotSupported for offload of ranks that divide the weights.
    """
    if quantization is Quantization.FP8:
        check_fp8(torch.device(device), dtype)
    model = _unplaced_model(checkpoint.config, role, dtype, delimiter_ids, groups, quantization)
    # While the model has no memory, so that a checkpoint that does not fit costs nothing.
    check_role(checkpoint, model)
    if offload and groups.weights.size > 1:
        raise NotSupported("HSDP divides the weights over GPUs, cpu_offload keeps them on the host; leave out one")
    model = _place(model, device, attention, eager=eager, offload=offload)
    fill(checkpoint, [mine for slot in slots(model) if (mine := kept(slot)) is not None], model.device)
    if (stream := model.language_model.layers.stream) is not None:
        stream.move()
    return model.eval()


def empty_model(
    config: ModelConfig,
    role: Role,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    delimiter_ids: tuple[int, int] = (0, 1),
    groups: Groups = UNDIVIDED,
    quantization: Quantization | None = None,
) -> Bagel:
    """A model without values, on any device (meta takes no memory)."""
    return _place(_unplaced_model(config, role, dtype, delimiter_ids, groups, quantization), device)


def _unplaced_model(
    config: ModelConfig,
    role: Role,
    dtype: torch.dtype,
    delimiter_ids: tuple[int, int] = (0, 1),
    groups: Groups = UNDIVIDED,
    quantization: Quantization | None = None,
) -> Bagel:
    """A model that has shapes and types alone."""
    linears = LinearFactory(dtype, groups, quantization)
    # Elsewhere PyTorch would fill every weight with random values, only to be overwritten.
    with torch.device("meta"):
        return Bagel(config, role, delimiter_ids, linears=linears).requires_grad_(False)


def _place(
    model: Bagel, device: torch.device | str, attention: str = AUTO, *, eager: bool = False, offload: bool = False
) -> Bagel:
    """Give a model memory on a device: all of it, or the part of a rank that shares the weights with others."""
    decoder, sharing, device = model.language_model, model.groups.weights, torch.device(device)
    tables = _large_tables(decoder)
    # Divided while it has no memory, so that a rank never holds more than its part.
    if readable(sharing, device):
        decoder.layers.stream = divided_stream(list(decoder.layers), _experts(model), sharing, device)
        shard(tables, sharing, device)
    else:
        shard(tables, sharing, device, layers=decoder.layers)
    if offload:
        keep_layers_on_host(model, device)
        _place_the_rest(model, device)
    else:
        model.to_empty(device=device)
    gather_once([*decoder.layers, *tables])
    # `to_empty` leaves it without values, and no file has them.
    decoder.rotary.reset()
    backend = choose_backend(model.device, model.dtype, attention=attention, eager=eager, groups=model.groups)
    if decoder.layers.stream is not None:
        backend = launched_one_by_one(backend)
    elif sharing.size > 1:
        backend = launched_in_order(backend)
    decoder.backend = backend
    if backend.kernels is not TORCH and model.vae is not None:
        model.vae.fuse()
    return model


def _place_the_rest(model: Bagel, device: torch.device | str) -> None:
    """Give memory to the modules that have none yet."""
    for module in model.modules():
        if all(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)


def keep_layers_on_host(model: Bagel, device: torch.device) -> LayerStream:
    """Let the weights of a model's layers lie in the host's memory, and be brought to the device as they are needed.

    They keep their values, if they have any; the stream's `move` lets the model compute.
    """
    layers = model.language_model.layers
    layers.stream = host_stream(list(layers), _experts(model), device)
    return layers.stream


def _experts(model: Bagel) -> Sequence[Sequence[str]]:
    """The modules of each expert in a layer, by their names."""
    return EXPERTS if model.role.parts.generation else EXPERTS[:1]


def _large_tables(decoder: MoTDecoder) -> list[nn.Module]:
    """The embedding and the LM head of a role with text. A role without text keeps two rows of the one."""
    return [] if decoder.lm_head is None else [decoder.embed_tokens, decoder.lm_head]


def random_model(
    config: ModelConfig,
    role: Role,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    quantization: Quantization | None = None,
) -> Bagel:
    """A model with random weights made in place, scaled so that activations stay near one; for benchmarks.

    Quantised, it has the same weights, rounded.
    """
    model = empty_model(config, role, dtype=dtype, device=device, quantization=quantization)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if kind == "scale":
            continue  # its weight's values made it
        deviation = parameter[0].numel() ** -0.5
        if "norm" in path.rpartition(".")[-1] and kind == "weight":
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        elif isinstance(layer := model.get_submodule(path), Fp8Linear):
            plain = torch.empty(parameter.shape, dtype=dtype, device=device)
            quantise_into(plain.normal_(0.0, deviation, generator=generator), layer.weight, layer.scale, plain.device)
        else:
            parameter.normal_(0.0, deviation, generator=generator)
    return model.eval()


def check_role(checkpoint: Checkpoint, model: Bagel) -> None:
    """Raise CheckpointError unless the checkpoint's files hold what this model needs, and only what BAGEL has."""
    files = {file: checkpoint.tensors(file) for file in (EMA, AE)}
    check_known(files, checkpoint.config, str(checkpoint.folder))
    check_tensors({file: shapes(checkpoint, file) for file in files}, list(slots(model)), str(checkpoint.folder))


def check_known(files: Mapping[str, Mapping[str, TensorInfo]], config: ModelConfig, where: str) -> None:
    """Raise CheckpointError for quantised weights and for tensors that no role uses."""
    idle = check_plain(files, known_names(config), config, where)
    if idle:
        logger.info("%s holds tensors that are left alone: %s", where, few(idle))


def check_tensors(files: Mapping[str, Shapes], needed: Sequence[Slot], where: str) -> None:
    """Compare what a model needs with what the files hold. Raises CheckpointError with every difference."""
    problems = []
    # A tensor of several slots is reported once.
    for file, name, shape in dict.fromkeys((slot.file, slot.name, slot.shape) for slot in needed):
        found = files[file].get(name)
        if found is None:
            problems.append(f"{file} lacks {name} {list(shape)}")
        elif tuple(found) != shape:
            problems.append(f"{file}: {name} is {list(found)}, the configuration makes it {list(shape)}")
    if problems:
        raise CheckpointError(f"{where} does not fit its configuration: {few(problems)}")


def shapes(checkpoint: Checkpoint, file: str) -> Shapes:
    """Names and shapes of a file's tensors."""
    return {name: info.shape for name, info in checkpoint.tensors(file).items()}


def known_names(config: ModelConfig) -> set[str]:
    """The name of every tensor that some role uses."""
    return {slot.name for slot in slots(_unplaced_model(config, Role.FULL, torch.bfloat16))}


def fill(checkpoint: Checkpoint, needed: Sequence[Slot], device: torch.device | str = "cpu") -> None:
    """Read slots from the files of a checkpoint that has been checked, and no other bytes of them.

    device: quantises them.
    """
    for file in dict.fromkeys(slot.file for slot in needed):
        with SliceReader(checkpoint.path(file), checkpoint.header(file)) as reader:
            buffer = torch.empty(0, dtype=torch.uint8)
            for slot in needed:
                if slot.file == file:
                    buffer = _read(reader, slot, checkpoint.tensors(file)[slot.name].dtype, buffer, device)


def _read(reader: SliceReader, slot: Slot, stored: str, buffer: Tensor, device: torch.device | str) -> Tensor:
    """Fill a slot by way of a buffer, which is returned for the next slot. A larger one is made where it is too small.

    Memory that is used again is already mapped: that makes reading from the page cache about twice as fast.
    """
    dtype = STORED_TYPES[stored]
    nbytes = slot.target.numel() * dtype.itemsize
    if len(buffer) < nbytes:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
    reader.read(slot.part, buffer.numpy().data[:nbytes])
    slot.fill(buffer[:nbytes].view(dtype).view(slot.target.shape), device)
    return buffer


def inventory(files: Mapping[str, Shapes], config: ModelConfig, where: str) -> list[str]:
    """One line a role: tensors, parameters and bytes in bfloat16. Raises CheckpointError if the files do not fit."""
    lines = []
    for role in Role:
        needed = list(slots(_unplaced_model(config, role, torch.bfloat16)))
        check_tensors(files, needed, where)
        names = {slot.name for slot in needed}
        count = sum(slot.target.numel() for slot in needed)
        size = sum(slot.target.nbytes for slot in needed)
        lines.append(
            f"{role:<11} {len(names):>5} tensors {count / 1e9:>8.3f} B parameters"
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
    """Print the inventory of a checkpoint or of a list of tensors; returns the exit code."""
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
