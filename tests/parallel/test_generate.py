"""Engines of several ranks that are called alike, with more requests than they serve at once."""

from __future__ import annotations

import pytest
from PIL.Image import Image

from bagel.checkpoint.files import Checkpoint
from bagel.engine.local import BagelEngine
from bagel.parallel.groups import Groups
from bagel.parallel.mesh import Mesh
from tests.helpers import agree, request
from tests.parallel.ranks import Ranks
from tests.shared import MODEL

pytestmark = pytest.mark.slow


def generate(groups: Groups) -> list[Image | None]:
    engine = BagelEngine.load(Checkpoint(MODEL), groups=groups, max_num_seqs=2)
    asked = [request("text2img", seed=steps, steps=steps) for steps in (3, 8, 4, 5)]
    return [result.image for result in engine.generate(asked)]


def test_requests_begin_at_the_same_turn_on_all_ranks(ranks: Ranks) -> None:
    """The first rank alone decodes, which takes time that the others must not use to begin the next request."""
    (wanted,) = ranks.run(Mesh(), generate)
    first, second = ranks.run(Mesh(cfg=2), generate)
    assert second == [None] * len(wanted)
    assert all(agree(ours, one) for ours, one in zip(first, wanted, strict=True))
