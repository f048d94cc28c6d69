"""The callers of the load bench tell right answers from wrong ones, and from refusals and departures."""

from __future__ import annotations

from collections import Counter
from io import BytesIO

import pytest
from PIL import Image

from bench import load_callers
from bench.load_callers import Plan
from tests.shared import Borrow


def png(*first: int) -> bytes:
    picture, stream = Image.new("RGB", (40, 40), (9, 9, 9)), BytesIO()
    picture.putpixel((0, 0), first)
    picture.save(stream, "PNG")
    return stream.getvalue()


def test_answers_are_equal_by_their_pixels_but_for_single_steps() -> None:
    assert load_callers._same(png(9, 9, 9), png(9, 9, 10))
    assert not load_callers._same(png(9, 9, 9), png(9, 9, 11))
    assert load_callers._same(b"a text", b"a text") and not load_callers._same(b"a text", b"another")


@pytest.mark.slow
def test_callers_hold_each_answer_against_its_twin(borrow: Borrow) -> None:
    services = borrow("bagel")
    right = load_callers.twins(services.address, services.http)
    plan = Plan(services.address, services.http, rate=10.0, seconds=2.0, callers=60, twins=right)
    outcomes, cpu_s = load_callers.call(plan, 0)
    ends = Counter(each.kind for each in outcomes)
    assert ends["right"] and cpu_s > 0 and not ends["wrong"] + ends["failed"], outcomes
    other = Plan(services.address, services.http, 10.0, 1.0, 60, dict.fromkeys(right, b"wrong"))
    assert "wrong" in {each.kind for each in load_callers.call(other, 1)[0]}
