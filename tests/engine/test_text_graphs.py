"""Text decoding as CUDA graphs: the same logits as a forward that is launched kernel by kernel."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.context import Context
from bagel.engine.memory import kv_space
from bagel.engine.sampling import Choice, choose
from bagel.engine.text import TextBatch, TextRun
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import load_model
from bagel.request import TextSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


MIXED = [(1.0, 0), (0.7, 0), (1.0, 3), (0.9, 20)]
"""top_p and top_k of texts."""


class Both(TextBatch):
    """Runs each step both ways on the same K/V, and keeps how far the logits lie apart."""

    apart: ClassVar[list[float]] = []

    def _forward(self) -> tuple[Tensor, Tensor]:
        fed = [self._fed(entry) for entry in self._entries]
        logits, best = (found.clone() for found in self._captured().forward(fed))
        wanted, _ = self._eager(fed)
        self.apart.append(float((logits - wanted).float().norm() / wanted.float().norm()))
        assert best[0].tolist() == logits.argmax(-1).tolist()
        return logits, best


def test_texts_that_come_and_go_get_the_same_logits(checkpoint: Checkpoint, tokenizer: BagelTokenizer) -> None:
    model = load_model(checkpoint, Role.FULL, delimiter_ids=(1, 2), dtype=torch.bfloat16, device="cuda")
    batch = Both(model, tokenizer, kv_space(model, None))
    for tokens in (40, 3, 9, 25, 14, 31):
        batch.add(TextRun(Context(), TextSettings(max_tokens=tokens), seed=0))
        for _ in range(5):
            if len(batch):
                batch.step()
    while len(batch):
        batch.step()
    assert max(batch.apart) < 0.02


def test_a_capture_leaves_the_kv_of_other_texts_alone(checkpoint: Checkpoint, tokenizer: BagelTokenizer) -> None:
    model = load_model(checkpoint, Role.FULL, delimiter_ids=(1, 2), dtype=torch.bfloat16, device="cuda")
    space = kv_space(model, None)
    batch = TextBatch(model, tokenizer, space)
    batch.add(TextRun(Context(), TextSettings(max_tokens=9), seed=0))
    batch.step()
    first = space.slab.k[:, :1].clone()
    batch.add(TextRun(Context(), TextSettings(max_tokens=9), seed=0))
    batch.step()  # the first one of two texts
    assert torch.equal(space.slab.k[:, :1], first)


def test_texts_are_sampled_as_without_a_graph(checkpoint: Checkpoint, tokenizer: BagelTokenizer) -> None:
    model = load_model(checkpoint, Role.FULL, delimiter_ids=(1, 2), dtype=torch.bfloat16, device="cuda")
    batch = TextBatch(model, tokenizer, kv_space(model, None))
    asked = [TextSettings(), *(TextSettings(do_sample=True, temperature=1.0, top_p=p, top_k=k) for p, k in MIXED)]
    for settings in asked:
        batch.add(TextRun(Context(), settings, seed=0))
    graphs = batch._captured()
    for take in range(3):  # the first one captures
        choices = [Choice(settings, (), (take + 0.5) / 3) for settings in asked]
        logits, best = graphs.forward([batch._fed(entry) for entry in batch._entries])
        wanted = choose(logits.cpu(), choices)
        graphs.sample(choices)
        assert best[0].tolist() == wanted.tolist()
        assert best[1].all()
