"""A logits processor for vLLM, with which sampled and penalised texts equal those of the torch engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from bagel.engine.sampling import choose
from bagel_thinker.vllm.choice import KEY, Text


class Chooser(LogitsProcessor):
    """Rules out all tokens but the chosen one, in the rows of requests that carry a `choice`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._texts: dict[int, Text] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the changes of vLLM's batch, in vLLM's order: removed rows, then added, then moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._texts.pop(row, None)
        for row, params, _, output in batch_update.added:
            self._texts.pop(row, None)  # a new request may take the row of one that has ended
            if given := (params.extra_args or {}).get(KEY):
                self._texts[row] = Text.of(given, output)
        for one, other, way in batch_update.moved:
            here, there = self._texts.pop(one, None), self._texts.pop(other, None)
            if here is not None:
                self._texts[other] = here
            if there is not None and way.name == "SWAP":
                self._texts[one] = there

    def apply(self, logits: Tensor) -> Tensor:
        """logits [rows, vocab], changed in place."""
        if not self._texts:
            return logits
        rows, texts = list(self._texts), list(self._texts.values())
        tokens = choose(logits[rows], [text.choice for text in texts])
        for text, token in zip(texts, tokens, strict=True):
            text.take(token)
        ruled_out = logits.new_full((len(rows), logits.shape[-1]), float("-inf"))
        logits[rows] = ruled_out.scatter_(-1, tokens[:, None], 0.0)
        return logits
