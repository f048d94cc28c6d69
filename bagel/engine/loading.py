"""A model loaded for one role, with what goes with it: tokenizer, planner, fingerprints."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.limits import position_limit
from bagel.checkpoint.roles import Role
from bagel.engine.segments import ChainPlanner
from bagel.kv.digests import fingerprint
from bagel.kv.pages import KvLayout
from bagel.model.bagel import Bagel
from bagel.model.threads import settle_threads
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device; kv_fingerprint names the K/V it makes, max_model_len the positions it serves."""

    model: Bagel
    tokenizer: BagelTokenizer
    checkpoint: Checkpoint
    planner: ChainPlanner
    kv_fingerprint: bytes
    max_model_len: int

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def memory(self) -> dict[str, int]:
        """Bytes of weights by component."""
        sizes: dict[str, int] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            component = name.partition(".")[0]
            sizes[component] = sizes.get(component, 0) + tensor.nbytes
        return sizes


def load_role(
    checkpoint: Checkpoint, role: Role, *, dtype: torch.dtype, device: torch.device, max_model_len: int | None = None
) -> LoadedModel:
    """Load the parts of a checkpoint that a role needs; raises CheckpointError if its files do not fit."""
    with checkpoint.loading():
        tokenizer = BagelTokenizer(checkpoint.folder)
        delimiters = (tokenizer.image_start, tokenizer.image_end)
        model = load_model(checkpoint, role, delimiter_ids=delimiters, dtype=dtype, device=device)
    settle_threads(model.config, device)
    backend = model.language_model.backend
    chosen = {"attention": backend.attention, "kernels": backend.kernels.name, "device": str(device)}
    logger.info("backend", extra={"fields": chosen})
    kv_fingerprint = fingerprint(checkpoint.fingerprint, str(dtype).removeprefix("torch."))
    planner = ChainPlanner(model.config, tokenizer, kv_fingerprint)
    return LoadedModel(
        model, tokenizer, checkpoint, planner, kv_fingerprint, position_limit(model.config, max_model_len)
    )


def kv_layout(checkpoint: Checkpoint, dtype: str) -> KvLayout:
    """The K/V of a checkpoint's model."""
    llm = checkpoint.config.llm
    return KvLayout(llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim, dtype)
