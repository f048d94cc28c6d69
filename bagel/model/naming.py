"""Which part of which tensor of the checkpoint fills which part of the model.

Layers know the checkpoint's names themselves (`Linear.outputs`, `RMSNorm.name`); this file lists them, and names what
comes from PyTorch and diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bagel.checkpoint.files import AE, EMA
from bagel.checkpoint.slices import TensorSlice
from bagel.model.bagel import Bagel
from bagel.model.fp8 import quantise_into
from bagel.model.layers import AddedRMSNorm, HeadNorms, RMSNorm
from bagel.model.linear import Fp8Linear, Linear
from bagel.model.vae import diffusers_name
from bagel.model.vocabulary import VocabularyEmbedding
from bagel.parallel.hsdp import local, local_rows


@dataclass(frozen=True)
class Slot:
    """A slice of a tensor of the checkpoint, and the parameter that it fills from row `begin` to row `end`.

    shape: of the whole tensor in the file. scale: of each row of the parameter [rows, 1], where it is FP8.
    """

    file: str
    part: TensorSlice
    shape: tuple[int, ...]
    parameter: Tensor
    begin: int
    end: int
    scale: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The memory that it fills: of the slice's size, perhaps of another shape."""
        return self.parameter[self.begin : self.end]

    def fill(self, values: Tensor, device: torch.device | str) -> None:
        """Copy the slice's values, in the target's shape, into the model's memory. device: quantises them."""
        if self.scale is None:
            self.target.copy_(values)
        else:
            quantise_into(values, self.target, self.scale[self.begin : self.end], device)

    @property
    def name(self) -> str:
        """The tensor's name in the file."""
        return self.part.name


def kept(slot: Slot) -> Slot | None:
    """The part of a slot that fills rows which this rank keeps; None if it has none of them.

    Ranks that divide the weights (bagel.parallel.hsdp) keep some rows each; every other rank keeps all.
    """
    rows = local_rows(slot.parameter)
    begin, end = max(slot.begin, rows.start), min(slot.end, rows.stop)
    if begin >= end:
        return None
    if len(rows) == len(slot.parameter):
        return slot
    # Rows of a parameter are rows of the file's tensor, as such ranks split no layer.
    start = slot.part.start - slot.begin
    part = TensorSlice(slot.name, 0, start + begin, start + end)
    scale = None if slot.scale is None else local(slot.scale)
    return Slot(slot.file, part, slot.shape, local(slot.parameter), begin - rows.start, end - rows.start, scale)


def slots(model: Bagel) -> Iterator[Slot]:
    """Every slice of the checkpoint that this model needs, in the order of its parameters."""
    for path, module in model.named_modules():
        # The autoencoder has a file and names of its own, listed below.
        if path == "vae" or path.startswith("vae."):
            continue
        match module:
            case Linear():
                yield from _linear_slots(module)
            case RMSNorm() | AddedRMSNorm():
                yield _whole(f"{module.name}.weight", module.weight)
            case HeadNorms():
                for name, weight in zip(module.names, (module.q_weight, module.k_weight), strict=True):
                    yield _whole(f"{name}.weight", weight)
            case _ if path == "language_model.embed_tokens":
                yield from _embedding_slots(model, module)
            case _:
                for name, parameter in module.named_parameters(recurse=False):
                    yield _whole(f"{_vit_name(path)}.{name}", parameter)
    if model.vae is not None:
        yield from _vae_slots(model)


def _linear_slots(layer: Linear) -> Iterator[Slot]:
    """A column split takes rows of each tensor, a row split takes columns: PyTorch's weights are [outputs, inputs]."""
    for kind, parameter in layer.named_parameters(recurse=False):
        if kind == "scale":
            continue  # no file has it
        begin = 0
        for name, outputs in layer.outputs.items():
            weight, inputs = kind == "weight", layer.inputs
            shape = (outputs.whole, inputs.whole) if weight else (outputs.whole,)
            dimension, share = (1, inputs) if weight and inputs.count < inputs.whole else (0, outputs)
            part = TensorSlice(f"{name}.{kind}", dimension, share.start, share.stop)
            scale = layer.scale if weight and isinstance(layer, Fp8Linear) else None
            yield Slot(EMA, part, shape, parameter, begin, begin + outputs.count, scale)
            begin += outputs.count


def _embedding_slots(model: Bagel, embedding: nn.Module) -> Iterator[Slot]:
    """The rank's rows of the table, or of a role without text the image delimiters' rows, one slice each."""
    assert isinstance(embedding, nn.Embedding)
    name, table = "language_model.model.embed_tokens.weight", embedding.weight
    shape = (model.config.llm.vocab_size, embedding.embedding_dim)
    if isinstance(embedding, VocabularyEmbedding):
        share = embedding.share
        yield Slot(EMA, TensorSlice(name, 0, share.start, share.stop), shape, table, 0, share.count)
        return
    for row, token in enumerate(model.delimiter_ids):
        yield Slot(EMA, TensorSlice(name, 0, token, token + 1), shape, table, row, row + 1)


def _whole(name: str, parameter: Tensor, file: str = EMA, shape: tuple[int, ...] | None = None) -> Slot:
    """A tensor that fills a whole parameter. shape: in the file, if it is not the parameter's."""
    rows = len(parameter)
    return Slot(file, TensorSlice(name, 0, 0, rows), shape or tuple(parameter.shape), parameter, 0, rows)


def _vit_name(path: str) -> str:
    """The checkpoint's name of a module that is PyTorch's own. Only those of the ViT are called otherwise there."""
    return path.replace("vit_model.layers.", "vit_model.encoder.layers.").replace(
        "vit_model.", "vit_model.vision_model."
    )


def _vae_slots(model: Bagel) -> Iterator[Slot]:
    """The autoencoder's tensors. The attention's 1 x 1 convolutions are linear layers in diffusers."""
    assert model.vae is not None
    parameters = dict(model.vae.autoencoder.named_parameters())
    # Some names do not exist, like a shortcut where widths are equal; those are never looked up.
    file_names = {diffusers_name(name, len(model.config.vae.ch_mult)): name for name in _vae_file_names(model)}
    for name, parameter in parameters.items():
        convolution = ".attentions.0.to_" in name and parameter.dim() == 2
        shape = (*parameter.shape, 1, 1) if convolution else tuple(parameter.shape)
        yield _whole(file_names[name], parameter, AE, shape)


def _vae_file_names(model: Bagel) -> Iterator[str]:
    """Names of ae.safetensors for this configuration (BFL's AutoEncoder)."""
    config = model.config.vae
    for side in ("encoder", "decoder"):
        level_name = "down" if side == "encoder" else "up"
        stems = [
            "conv_in",
            "conv_out",
            "norm_out",
            *(f"mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")),
        ]
        blocks = [f"mid.block_{i}" for i in (1, 2)]
        for level in range(len(config.ch_mult)):
            count = config.num_res_blocks + (side == "decoder")
            blocks += [f"{level_name}.{level}.block.{i}" for i in range(count)]
            stems += [f"{level_name}.{level}.{level_name}sample.conv"]
        stems += [
            f"{block}.{part}" for block in blocks for part in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
        ]
        yield from (f"{side}.{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))
