"""Which tensor of the checkpoint fills which part of which parameter.

Projections that run together are one parameter here (q, k and v; gate and up) and several tensors in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from bagel.checkpoint.files import AE, EMA
from bagel.model.bagel import Bagel
from bagel.model.vae import diffusers_name

_EXPERT = re.compile(r"language_model\.(layers\.\d+)\.(und|gen)\.(.+)\.(weight|bias)")
_VIT_LAYER = re.compile(r"vit_model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Slot:
    """One tensor of the checkpoint and where it goes: rows [start, stop) of a parameter.

    shape is what the file must have. embedding: of that tensor a role without text keeps two rows.
    """

    file: str
    name: str
    parameter: Tensor
    start: int
    stop: int
    shape: tuple[int, ...]
    embedding: bool = False

    @property
    def target(self) -> Tensor:
        return self.parameter[self.start : self.stop]

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.parameter.element_size()


def slots(model: Bagel) -> Iterator[Slot]:
    """Every tensor of the checkpoint that this model's role needs, in the parameters' order."""
    for name, parameter in model.named_parameters():
        if name.startswith("vae.autoencoder."):
            continue
        if name == "language_model.embed_tokens.weight":
            shape = (model.config.llm.vocab_size, parameter.shape[1])
            rows = parameter.shape[0]
            yield Slot(EMA, "language_model.model.embed_tokens.weight", parameter, 0, rows, shape, embedding=True)
            continue
        start = 0
        for file_name, size in _pieces(model, name, parameter):
            yield Slot(EMA, file_name, parameter, start, start + size, (size, *parameter.shape[1:]))
            start += size
    if model.vae is not None:
        yield from _vae_slots(model)


def _pieces(model: Bagel, name: str, parameter: Tensor) -> list[tuple[str, int]]:
    """Names in the file of one parameter, with the rows that each fills."""
    llm, rows = model.config.llm, parameter.shape[0]
    if match := _EXPERT.fullmatch(name):
        prefix = f"language_model.model.{match[1]}"
        suffix, module, kind = "" if match[2] == "und" else "_moe_gen", match[3], match[4]
        if module == "qkv_proj":
            kv = llm.num_key_value_heads * llm.head_dim
            sizes = (("q", rows - 2 * kv), ("k", kv), ("v", kv))
            return [(f"{prefix}.self_attn.{which}_proj{suffix}.{kind}", size) for which, size in sizes]
        if module == "mlp.gate_up_proj":
            return [(f"{prefix}.mlp{suffix}.{which}_proj.{kind}", rows // 2) for which in ("gate", "up")]
        if module == "mlp.down_proj":
            return [(f"{prefix}.mlp{suffix}.down_proj.{kind}", rows)]
        where = "" if module.endswith("layernorm") else "self_attn."
        return [(f"{prefix}.{where}{module}{suffix}.{kind}", rows)]
    if match := _VIT_LAYER.fullmatch(name):
        prefix = f"vit_model.vision_model.encoder.layers.{match[1]}"
        if "qkv_proj" in match[2]:
            return [(f"{prefix}.{match[2].replace('qkv', which)}", rows // 3) for which in ("q", "k", "v")]
        return [(f"{prefix}.{match[2]}", rows)]
    if name.startswith("vit_model."):
        return [(name.replace("vit_model.", "vit_model.vision_model.", 1), rows)]
    if name.startswith("language_model.norm"):
        return [(name.replace("language_model.", "language_model.model.", 1), rows)]
    return [(name, rows)]


def _vae_slots(model: Bagel) -> Iterator[Slot]:
    """The autoencoder's tensors. diffusers keeps the attention's 1 x 1 convolutions as linear layers."""
    assert model.vae is not None
    parameters = dict(model.vae.autoencoder.named_parameters())
    file_names = {diffusers_name(name, len(model.config.vae.ch_mult)): name for name in _vae_file_names(model)}
    for name, parameter in parameters.items():
        convolution = ".attentions.0.to_" in name and parameter.dim() == 2
        shape = (*parameter.shape, 1, 1) if convolution else tuple(parameter.shape)
        yield Slot(AE, file_names[name], parameter, 0, parameter.shape[0], shape)


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
