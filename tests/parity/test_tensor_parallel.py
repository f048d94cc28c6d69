"""Ranks that divide every layer compute what was recorded of one: contexts, texts, every step of pictures."""

from __future__ import annotations

import pytest

from bagel.parallel.config import ParallelConfig
from bagel.parity.cases import compare_on_ranks
from bagel.parity.golden import Golden
from tests.conftest import GOLDEN

TOLERANCE = 1e-4
CASES = ("edit_small_text_channel", "img2text_small", "t2i_64x64_x_renorm_min0.95", "text_prefill", "think_edit")


@pytest.mark.slow
def test_two_ranks_agree_with_the_recordings() -> None:
    two = ParallelConfig(tensor_parallel_size=2)
    reports = {each.case: each for each in compare_on_ranks(Golden(GOLDEN), "cpu", TOLERANCE, two, CASES)}
    assert set(reports) == set(CASES)
    assert {name: each.failures for name, each in reports.items() if each.failures} == {}
    # K/V of all heads, logits of all tokens, the ViT's layers, velocities, latents and pixels.
    compared = set().union(*(each.errors for each in reports.values()))
    assert {"kv_gen", "gen.logits", "vit.layer", "v_guided", "x", "decoded"} <= compared
