"""Pages on their way to a rank: those that follow each other are one copy."""

from __future__ import annotations

from dataclasses import replace

from bagel.engine.commands import LandedPage
from bagel.prompts import BranchName
from bagel_dit.page_loader import joined

ROW = 64
FIRST = LandedPage(BranchName.GEN, layer=1, row=0, rows=4, k_offset=1000 * ROW, v_offset=2000 * ROW)
SECOND = replace(FIRST, row=4, rows=3, k_offset=1004 * ROW, v_offset=2004 * ROW)


def test_pages_that_follow_each_other_are_one_copy() -> None:
    third = replace(FIRST, row=7, rows=1, k_offset=1007 * ROW, v_offset=2007 * ROW)
    assert joined([third, FIRST, SECOND], ROW) == (replace(FIRST, rows=8),)


def test_pages_that_lie_apart_stay_apart() -> None:
    for other in (
        replace(SECOND, layer=2),
        replace(SECOND, branch=BranchName.CFG_IMG),
        replace(SECOND, row=5),
        replace(SECOND, k_offset=1005 * ROW),  # of another segment
        replace(SECOND, v_offset=2005 * ROW),
    ):
        assert sorted(joined([FIRST, other], ROW), key=str) == sorted((FIRST, other), key=str)
