"""Which tensors a checkpoint may hold: plain numbers, and no others than the network has. No torch here.

A quantised weight without its scale is noise, and looks like a weight: so neither other types nor tensors that nothing
would use are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.headers import TensorInfo
from bagel.checkpoint.json_files import shown_name
from bagel.errors import CheckpointError

PLAIN_TYPES = ("F32", "F16", "BF16")
PLAIN_WEIGHTS = "only plain weights in F32, F16 or BF16 are supported; use the checkpoint that this was made from"
NAMED = 5
"""Tensors named in a message, of many."""

# Constants that other programs save beside the weights, and the pooling head that BAGEL's ViT is without.
_IDLE = re.compile(r".*\.rotary_emb\.inv_freq|.*\.position_ids|vit_model\.vision_model\.head\..+")
_VIT_LAYER = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d{1,9})\..+")


def check_plain(
    files: Mapping[str, Mapping[str, TensorInfo]], known: Collection[str], config: ModelConfig, where: str
) -> list[str]:
    """The tensors that are there, known to be of no use, and left alone.

    known: every name that the network has. Raises CheckpointError for weights that are not plain numbers, and for
    tensors that nobody knows.
    """
    listed = [(file, name, info) for file, tensors in files.items() for name, info in tensors.items()]
    idle = {name for _, name, _ in listed if name not in known and _is_idle(name, config)}
    odd = [f"{file}: {shown_name(name)} is {info.dtype}" for file, name, info in listed if _is_odd(name, info, idle)]
    if odd:
        raise CheckpointError(f"{where} holds quantised weights, or none at all: {few(odd)}; {PLAIN_WEIGHTS}")
    unknown = [f"{file}: {shown_name(name)}" for file, name, _ in listed if name not in known and name not in idle]
    if unknown:
        raise CheckpointError(
            f"{where} holds tensors that BAGEL does not have and that nothing would use: {few(unknown)}; it is "
            f"quantised or of another architecture; {PLAIN_WEIGHTS}"
        )
    return sorted(idle)


def few(items: Sequence[str]) -> str:
    """The first few of many, as one text."""
    more = f" (and {len(items) - NAMED} more)" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + more


def _is_odd(name: str, info: TensorInfo, idle: Collection[str]) -> bool:
    return info.dtype not in PLAIN_TYPES and name not in idle


def _is_idle(name: str, config: ModelConfig) -> bool:
    """Whether it is left out on purpose: the ViT's last layer, which the reference never runs, is."""
    layer = _VIT_LAYER.fullmatch(name)
    return _IDLE.fullmatch(name) is not None or (layer is not None and int(layer[1]) == config.vit.num_hidden_layers)
