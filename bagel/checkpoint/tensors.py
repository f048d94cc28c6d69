"""Check a checkpoint's tensors: only plain number types, and only tensors that the network has. No torch here.

A quantised weight without its scale looks like a weight but is noise. So tensors of another type, or without a use,
are refused instead of skipped.
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
"""How many tensors a message names when there are more."""

# Constants that other programs save beside the weights, and the pooling head, which BAGEL's ViT lacks.
_IDLE = re.compile(r".*\.rotary_emb\.inv_freq|.*\.position_ids|vit_model\.vision_model\.head\..+")
_VIT_LAYER = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d{1,9})\..+")


def check_plain(
    files: Mapping[str, Mapping[str, TensorInfo]], known: Collection[str], config: ModelConfig, where: str
) -> list[str]:
    """Check all tensors of a checkpoint; returns the names of those that are known to have no use.

    known: every name in the network. Raises CheckpointError for weights that are not plain numbers and for unknown
    tensors.
    """
    listed = [(file, name, info) for file, tensors in files.items() for name, info in tensors.items()]
    idle = {name for _, name, _ in listed if name not in known and _is_idle(name, config)}
    odd = [
        f"{file}: {shown_name(name)} is {info.dtype}"
        for file, name, info in listed
        if info.dtype not in PLAIN_TYPES and name not in idle
    ]
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
    """Join the first few of many items into one text."""
    more = f" (and {len(items) - NAMED} more)" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + more


def _is_idle(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is skipped on purpose."""
    # The ViT's last layer: the reference never runs it.
    layer = _VIT_LAYER.fullmatch(name)
    return _IDLE.fullmatch(name) is not None or (layer is not None and int(layer[1]) == config.vit.num_hidden_layers)
