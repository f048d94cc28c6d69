"""Who computes what: coordinates in the mesh, and shares of heads and columns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.errors import ConfigError
from bagel.parallel.mesh import Mesh, Rank, Share

LLM = BAGEL_7B_MOT.llm


def test_every_rank_has_its_coordinates_and_tp_ranks_are_neighbours() -> None:
    mesh = Mesh(data=2, cfg=3, context=2, tp=4)
    ranks = [mesh.rank(index) for index in range(mesh.size)]
    assert mesh.size == len({(r.data, r.cfg, r.context, r.tp) for r in ranks}) == 48
    assert [rank.index for rank in ranks] == list(range(48))
    assert [rank.tp for rank in ranks[:5]] == [0, 1, 2, 3, 0]
    assert ranks[-1] == Rank(mesh, 1, 2, 1, 3)
    assert Mesh().rank(0) == Rank()


def test_a_mesh_without_ranks_and_a_rank_outside_are_refused() -> None:
    with pytest.raises(ConfigError, match="the mesh has 0 ranks along tp; at least 1 is needed"):
        Mesh(tp=0)
    with pytest.raises(ConfigError, match="rank 4 is not in a mesh of 4 ranks"):
        Mesh(cfg=2, tp=2).rank(4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_are_equal_and_cover_everything_once(ranks: int) -> None:
    shares = [Mesh(tp=ranks).rank(tp).decoder(LLM) for tp in range(ranks)]
    for parts, whole in (
        ([share.heads for share in shares], 28),
        ([share.kv_heads for share in shares], 4),
        ([share.columns for share in shares], 18944),
    ):
        assert [item for part in parts for item in range(part.start, part.stop)] == list(range(whole))
        assert {part.count for part in parts} == {whole // ranks}


def test_other_axes_divide_no_layer() -> None:
    assert Mesh(data=2, cfg=3, context=4).rank(23).decoder(LLM) == Rank().decoder(LLM)


def test_ranks_beyond_the_kv_heads_keep_the_one_that_their_queries_attend_to() -> None:
    llm = replace(LLM, num_attention_heads=32, hidden_size=4096, num_key_value_heads=2)
    shares = [Mesh(tp=8).rank(tp).decoder(llm) for tp in range(8)]
    assert [share.kv_heads for share in shares] == [Share(0, 1, 2)] * 4 + [Share(1, 2, 2)] * 4
    for share in shares:
        assert {head // 16 for head in range(share.heads.start, share.heads.stop)} == {share.kv_heads.start}


def test_what_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ConfigError, match=r"28 heads, 4 K/V heads .* among 8 .* choose a size of 1, 2, 4$"):
        Mesh(tp=8).rank(0).decoder(LLM)
    small = replace(LLM, num_attention_heads=6, hidden_size=96, num_key_value_heads=2, intermediate_size=256)
    with pytest.raises(ConfigError, match=r"6 heads, 2 K/V heads .* among 3 .* choose a size of 1, 2$"):
        Mesh(tp=3).rank(0).decoder(small)
