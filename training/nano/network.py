"""bagel-nano's sizes, its initial weights, and its checkpoint in the layout of BAGEL-7B-MoT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bagel.checkpoint.config_files import read_model_config
from bagel.checkpoint.files import EMA
from bagel.checkpoint.roles import Role
from bagel.model.bagel import Bagel
from bagel.model.naming import slots
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import empty_model
from training.nano.tokens import train_tokenizer
from training.nano.world import SIDE


@dataclass(frozen=True)
class Sizes:
    """The network's sizes; a trial run takes smaller ones."""

    hidden: int = 192
    layers: int = 8
    heads: int = 3
    kv_heads: int = 3
    intermediate: int = 544
    vit_hidden: int = 128
    vit_layers: int = 4
    vit_intermediate: int = 384
    vae_channels: int = 64  # with 32, a group of the norms would be a single channel, which loses its mean: the colour


NANO = Sizes()
TINY = Sizes(64, 2, 1, 1, 96, 32, 1, 48, 32)
VIT_SIDE, PATCH = 112, 14


def write_config(folder: Path, sizes: Sizes) -> None:
    """Write the tokenizer and config.json, llm_config.json, vit_config.json, generation_config.json."""
    train_tokenizer(folder)
    tokenizer = BagelTokenizer(folder)
    llm, vit = _llm_config(tokenizer, sizes), _vit_config(sizes)
    generation = {"bos_token_id": tokenizer.bos, "do_sample": False, "eos_token_id": [tokenizer.eos, tokenizer.bos]}
    config = _bagel_config(sizes, llm, vit)
    files = {"config": config, "llm_config": llm, "vit_config": vit, "generation_config": generation}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _llm_config(tokenizer: BagelTokenizer, sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 4096,
        "model_type": "qwen2",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(tokenizer),
    }


def _vit_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes.vit_hidden,
        "image_size": VIT_SIDE,
        "intermediate_size": sizes.vit_intermediate,
        "layer_norm_eps": 1e-6,
        "model_type": "siglip_vision_model",
        "num_attention_heads": max(1, sizes.vit_hidden // 32),
        "num_channels": 3,
        "num_hidden_layers": sizes.vit_layers + 1,  # the last layer never runs, as in the reference
        "patch_size": PATCH,
    }


def _bagel_config(sizes: Sizes, llm: dict[str, Any], vit: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["BagelForConditionalGeneration"],
        "connector_act": "gelu_pytorch_tanh",
        "default_image_size": [SIDE, SIDE],
        "image_transforms": {"vae": [SIDE, SIDE, 16], "vit": [VIT_SIDE, VIT_SIDE, PATCH]},
        "interpolate_pos": False,
        "latent_patch_size": 2,
        "llm_config": {**llm, "layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True},
        "max_latent_size": SIDE // 16,
        "model_type": "bagel",
        "timestep_shift": 1.0,
        "torch_dtype": "bfloat16",
        "vae_config": {
            "ch": sizes.vae_channels,
            "ch_mult": [1, 1, 1, 1],
            "downsample": 8,
            "in_channels": 3,
            "num_res_blocks": 1,
            "out_ch": 3,
            "resolution": SIDE,
            "scale_factor": 0.3611,
            "shift_factor": 0.1159,
            "z_channels": 16,
        },
        "visual_gen": True,
        "visual_und": True,
        "vit_config": vit,
        "vit_max_num_patch_per_side": VIT_SIDE // PATCH,
    }


def new_model(folder: Path, device: torch.device | str, seed: int = 0) -> Bagel:
    """A float32 model of the folder's configuration with initial weights; all but the position tables learn."""
    tokenizer = BagelTokenizer(folder)
    delimiters = (tokenizer.image_start, tokenizer.image_end)
    config = read_model_config(folder)
    model = empty_model(config, Role.FULL, dtype=torch.float32, device="cpu", delimiter_ids=delimiters)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, config.llm.num_hidden_layers)
        assert model.latent_pos_embed is not None and model.vit_pos_embed is not None and model.vae is not None
        for table in (model.latent_pos_embed, model.vit_pos_embed):
            table.pos_embed.copy_(position_table(table.side, config.llm.hidden_size))
        for module in model.vae.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
    model.requires_grad_(True)
    model.latent_pos_embed.requires_grad_(False)
    model.vit_pos_embed.requires_grad_(False)
    return model.to(device)


def _initialise(name: str, parameter: Tensor, layers: int) -> None:
    if "norm" in name.split(".")[-2] and name.endswith("weight"):
        parameter.fill_(1.0)
    elif parameter.dim() == 1 or name == "llm2vae.weight":  # a zero output layer: the first velocities are zero
        parameter.zero_()
    elif "embed" in name and "patch" not in name and "time" not in name:
        parameter.normal_(0.0, 0.5)
    else:
        # Smaller where a layer adds to the residual stream, so that its variance does not grow with the depth.
        scale = 0.5 / layers**0.5 if "o_proj" in name or "down_proj" in name else 1.0
        parameter.normal_(0.0, scale * parameter[0].numel() ** -0.5)


def position_table(side: int, width: int) -> Tensor:
    """Sines and cosines of the columns, then of the rows, [side * side, width], rounded to bfloat16 as when stored."""
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (columns, rows)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return table.to(torch.bfloat16).float()


def export(model: Bagel, folder: Path) -> int:
    """Write ema.safetensors, ae.safetensors and the index beside the configuration; returns the two files' bytes."""
    files: dict[str, dict[str, Tensor]] = {}
    for slot in slots(model):
        tensor = slot.target.detach().reshape(slot.shape).to(torch.bfloat16).cpu().contiguous().clone()
        files.setdefault(slot.file, {})[slot.name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in files[EMA].values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(files[EMA]), EMA)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
