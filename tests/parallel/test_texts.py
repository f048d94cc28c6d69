"""Texts that several ranks decode together: all go on with the first one's ids, from a graph too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.engine.context import Context
from bagel.engine.local import BagelEngine
from bagel.engine.memory import kv_space_of
from bagel.engine.text import TextBatch, TextRun
from bagel.parallel.groups import Groups
from bagel.parallel.mesh import Mesh
from bagel.request import TextSettings
from tests.parallel.ranks import Ranks
from tests.shared import MODEL

pytestmark = pytest.mark.slow

TEXTS, TOKENS = 3, 4


class OfAGraph(TextBatch):
    """Gives a part of a larger tensor, as a graph of four texts does; but for the first rank, nothing is finite."""

    def _forward(self) -> tuple[Tensor, Tensor]:
        logits, found = super()._forward()
        if self.model.groups.world.index:
            found[:] = 0
        return logits, torch.cat((found, found[:, :1]), dim=1)[:, : len(logits)]


def decode(groups: Groups) -> list[tuple[list[int], str]]:
    engine = BagelEngine.load(Checkpoint(MODEL))
    engine.model.groups = groups
    runs = [TextRun(Context(), TextSettings(max_tokens=TOKENS), seed=seed) for seed in range(TEXTS)]
    batch = OfAGraph(engine.model, engine.tokenizer, kv_space_of(engine.model, [TOKENS] * TEXTS))
    for run in runs:
        batch.add(run)
    while len(batch):
        batch.step()
    return [(run.tokens, str(run.error)) for run in runs]


def test_all_ranks_go_on_with_the_ids_of_the_first(ranks: Ranks) -> None:
    (wanted,) = ranks.run(Mesh(), decode)
    assert all(error == "None" for _, error in wanted)
    assert ranks.run(Mesh(cfg=2), decode) == [wanted, wanted]
