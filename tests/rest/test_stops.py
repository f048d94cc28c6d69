"""Texts that end an answer: across pieces, held back no longer than needed, and the stages end with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from bagel.engine.text_scheduler import TextWritten
from bagel.v1 import common_pb2, gateway_pb2
from bagel_gateway.rest.stops import Stop
from bagel_gateway.serving import _joined
from bagel_thinker.server import _join
from tests.gateway_stages import Deployment
from tests.rest.test_front import CHAT, post, through

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def told(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What is given out of each piece, what of the end, and whether a stop text came."""
    stop, given_out = Stop(stops), list[str]()
    for piece in pieces:
        given_out.append(stop.push(piece))
        if stop.stopped:
            return given_out, True
    return [*given_out, stop.end()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["a E", "N", "D b"], (["a ", "", ""], True)),
        (["END"], ["a E", "N", "T"], (["a ", "", "ENT", ""], False)),
        (["END"], ["a E"], (["a ", "E"], False)),
        (["b", "ab"], ["xab"], (["x"], True)),
        (["aab"], ["aa", "ab"], (["", "a"], True)),
        (["\n"], ["one\ntwo"], (["one"], True)),
        (["abcd", "c"], ["ab", "c", "d"], (["", "ab"], True)),
        (["abcd", "c"], ["abcd"], (["ab"], True)),
        ([], ["one", "two"], (["one", "two", ""], False)),
    ],
)
def test_a_stop_text_ends_an_answer_wherever_its_pieces_are_cut(
    stops: list[str], pieces: list[str], expected: tuple[list[str], bool]
) -> None:
    assert told(stops, pieces) == expected


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=4), st.lists(st.text("ab", max_size=3), max_size=8))
def test_what_is_given_out_is_the_text_up_to_the_first_stop_text(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    given_out, ended = told(stops, pieces)
    read = ""
    for letter in whole:  # the first letter that completes a stop text ends the answer, wherever pieces are cut
        read += letter
        if found := [stop for stop in stops if read.endswith(stop)]:
            assert ended and "".join(given_out) == read.removesuffix(max(found, key=len))
            return
    assert not ended and "".join(given_out) == whole


@pytest.mark.parametrize("think", [False, True])
def test_pieces_that_wait_together_have_the_tokens_of_the_last(think: bool) -> None:
    pieces = [common_pb2.TextDelta(text=text, think=think, tokens=tokens) for text, tokens in (("a", 2), ("b", 5))]
    one, other = (gateway_pb2.GenerateResponse(text=piece) for piece in pieces)
    assert _joined((1, one), (1, other)) == (1, one) and one.text == common_pb2.TextDelta(
        text="ab", think=think, tokens=5
    )
    assert _join(TextWritten("a", 2), TextWritten("b", 5)) == TextWritten("ab", 5)


STOPS = [("o b", "s"), (["zzz", "be"], "so "), ("it!", "so be it"), (None, "so be it")]


@pytest.mark.parametrize(("stop", "answer"), STOPS)
def test_chats_stop_whole_and_streamed_alike(stop: Any, answer: str) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(**ASK, stop=stop, n=2)
        assert [choice.message.content for choice in whole.choices] == [answer] * 2
        assert {choice.finish_reason for choice in whole.choices} == {"stop"}
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(**ASK, stop=stop, **more)]
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(choice.delta.content or "" for choice in choices) == answer
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
        assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens > 0

    through(work)


def test_the_stages_end_with_the_answer() -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        at.thinkers[0].think_go.clear()  # the second piece of the text never comes
        answer = await client.chat.completions.create(**ASK, stop="o")
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("s", "stop")
        assert answer.usage is not None and answer.usage.completion_tokens == 3  # of the first piece, which was written
        await at.settled()
        assert "build is cancelled" in at.journal.events

    through(work)


@pytest.mark.parametrize("stop", ["", ["a"] * 5, [""], "x" * 257, 7, [7]])
def test_what_is_no_stop_text_is_refused(stop: object) -> None:
    async def work(at: Deployment, client: AsyncOpenAI) -> None:
        status, answer = await post(at, CHAT, ASK | {"stop": stop})
        assert status == 400 and answer["error"]["param"].startswith("stop")
        status, answer = await post(at, CHAT, ASK | {"stop": "x", "modalities": ["image"]})
        assert status == 400 and "no effect on a picture" in answer["error"]["message"]

    through(work)
