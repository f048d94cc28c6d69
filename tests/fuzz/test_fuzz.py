"""Each target reads its corpus and some hundred mutations: only documented errors, and every round trip holds."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.target import CORPUS, corpus, load, names

MOST_BYTES = 256 * 2**20
"""Python's memory that one small input may take at once."""
LARGEST_CORPUS = 2**20
RUNS = 150


@pytest.mark.parametrize("name", names())
def test_the_corpus_is_read_or_refused_as_documented(name: str) -> None:
    target, accepted = load(name), 0
    for data in corpus(name):
        tracemalloc.start()
        try:
            accepted += target.run(data)
            assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
        finally:
            tracemalloc.stop()
    assert accepted, "nothing in the corpus is accepted, so its round trips were not tried"


@pytest.mark.parametrize("name", names())
def test_what_is_nearly_right_is_read_or_refused_as_documented(name: str) -> None:
    target, inputs = load(name), [data for data in corpus(name) if len(data) <= load(name).longest]

    @settings(max_examples=RUNS, deadline=None, database=None)
    @given(st.data())
    def mutated(draw: st.DataObject) -> None:
        data = bytearray(draw.draw(st.sampled_from(inputs)))
        for _ in range(draw.draw(st.integers(1, 4))):
            at = draw.draw(st.integers(0, len(data)))
            end = min(len(data), at + draw.draw(st.integers(0, 8)))
            word = st.sampled_from(target.words) | st.binary(max_size=3)
            match draw.draw(st.sampled_from(["flip", "insert", "replace", "drop", "copy"])):
                case "flip" if at < len(data):
                    data[at] ^= 1 << draw.draw(st.integers(0, 7))
                case "insert":
                    data[at:at] = draw.draw(word)
                case "replace":
                    data[at:end] = draw.draw(word)
                case "drop":
                    del data[at:end]
                case "copy":
                    data[at:at] = data[at:end]
        target.run(bytes(data))

    mutated()


def test_the_corpus_is_small_and_of_targets_that_there_are() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert {file.parent.name for file in files} <= set(names())
    assert sum(file.stat().st_size for file in files) < LARGEST_CORPUS
