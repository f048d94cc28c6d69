"""Reading for many at once: what goes wrong with one ends that one, and the others never notice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bagel.engine.context import ContextBuilder
from bagel.engine.engine import BagelEngine
from bagel.engine.segments import Chain
from bagel.engine.text_graphs import best
from bagel.engine.text_scheduler import Reader, Reading, Written
from bagel.errors import BagelError, InvalidRequest, NotFinite
from bagel.request import TextSettings

MORE_THAN_ANY_MEMORY = 2**50


@dataclass
class Told:
    """What a reading told."""

    done: list[Written] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return len(self.done) + len(self.errors) == 1


def reader(engine: BagelEngine, **limits: int) -> Reader:
    builder = ContextBuilder(engine.model)
    kept: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 4096} | limits
    return Reader(engine.model, engine.tokenizer, engine.planner, builder, **kept)


def reading(at: Reader, prompt: str, max_tokens: int = 3, **more: Any) -> tuple[Reading, Told]:
    """A reading that writes a text, taken on; and what it will tell."""
    told = Told()
    made = Reading(
        at.planner.append_text(Chain(), prompt),
        seed=1,
        on_done=told.done.append,
        on_error=told.errors.append,
        settings=TextSettings(max_tokens=max_tokens),
        **{"on_text": told.texts.append, **more},
    )
    at.add(made)
    return made, told


def finish(at: Reader) -> None:
    for _ in range(200):
        if not at.busy:
            return
        at.work()
    raise AssertionError("readings are left that never end")


def raising(error: Exception) -> Any:
    def call(*args: object) -> None:
        raise error

    return call


def test_a_text_without_room_ends_alone(engine: BagelEngine) -> None:
    at = reader(engine)
    _, one = reading(at, "a red cup")
    _, huge = reading(at, "a whole library", max_tokens=MORE_THAN_ANY_MEMORY)
    _, other = reading(at, "a blue cup")
    finish(at)
    assert [len(told.done[0].token_ids) for told in (one, other)] == [3, 3]
    assert huge.over and isinstance(huge.errors[0], RuntimeError)
    _, later = reading(at, "a red cup")
    finish(at)
    assert later.done[0].token_ids == one.done[0].token_ids


@pytest.mark.parametrize("where", ["on_text", "on_done", "on_chain", "on_kv"])
def test_a_reading_whose_listener_fails_ends_alone(engine: BagelEngine, where: str) -> None:
    at = reader(engine)
    told = {"append": where == "on_chain", where: raising(BagelError("gone"))}
    made, failing = reading(at, "a red cup", **{name: value for name, value in told.items() if name != "on_done"})
    if where == "on_done":
        made.on_done = told[where]
    _, other = reading(at, "a blue cup")
    finish(at)
    assert [str(error) for error in failing.errors] == ["gone"] and not failing.done
    assert len(other.done[0].token_ids) == 3


def test_a_think_text_beyond_the_last_position_ends_alone(engine: BagelEngine) -> None:
    at = reader(engine, max_model_len=8)
    _, long = reading(at, "a red cup", max_tokens=12, append=True)
    _, other = reading(at, "a blue cup")
    finish(at)
    assert isinstance(long.errors[0], InvalidRequest) and long.over
    assert len(other.done[0].token_ids) == 3


def test_what_is_abandoned_is_told_once_and_holds_nothing(engine: BagelEngine) -> None:
    at = reader(engine, max_num_seqs=1)
    every = [reading(at, f"cup number {number}", max_tokens=50)[1] for number in range(3)]
    for _ in range(3):  # one is written, one waits for its place
        at.work()
    every.append(reading(at, "not begun")[1])
    at.abandon(BagelError("the engine failed"))
    assert all(told.over and str(told.errors[0]) == "the engine failed" for told in every)
    assert not at.busy
    _, next_ = reading(at, "a red cup")
    finish(at)
    assert len(next_.done[0].token_ids) == 3


def test_a_text_whose_logits_are_no_numbers_ends_and_the_others_go_on(
    engine: BagelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = reader(engine, max_num_seqs=5)
    alone = reading(at, "a cup", 12)[1]
    finish(at)
    told = [reading(at, "a cup", 12)[1] for _ in range(4)]
    fine = reading(at, "a cup", 12)[1]
    forward, odd = at._texts._forward, (float("nan"), float("-inf"), float("inf"))

    def overflow() -> tuple[torch.Tensor, torch.Tensor]:
        logits, _ = forward()
        if len(logits) > len(odd):
            for row, value in enumerate(odd):
                logits[row, 5:] = value
            logits[len(odd)] = float("-inf")
        return logits, best(logits)

    monkeypatch.setattr(at._texts, "_forward", overflow)
    finish(at)
    for each in told:
        (error,) = each.errors
        assert isinstance(error, NotFinite) and "use float32" in str(error)
    assert fine.texts == alone.texts and len(fine.done) == 1
