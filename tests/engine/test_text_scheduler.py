"""Contexts and texts of many requests at once: what goes wrong with one ends that one, and the others never notice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from bagel.engine.context import ContextBuilder
from bagel.engine.local import BagelEngine
from bagel.engine.memory import kv_space
from bagel.engine.segments import Chain
from bagel.engine.text import TextBatch, TextRun
from bagel.engine.text_graphs import best
from bagel.engine.text_scheduler import (
    ChainExtended,
    ContextDone,
    ContextEvent,
    ContextFailed,
    ContextRequest,
    LayersComputed,
    TextScheduler,
    TextWritten,
)
from bagel.errors import BagelError, InvalidRequest, NotFinite
from bagel.request import TextSettings


@dataclass
class Heard:
    """What a request emitted. failing: the event on which its receiver fails, and what that raises."""

    done: list[ContextDone] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    failing: type | None = None

    def emit(self, event: ContextEvent) -> None:
        if self.failing is not None and isinstance(event, self.failing):
            raise BagelError("gone")
        match event:
            case ContextDone():
                self.done.append(event)
            case ContextFailed():
                self.errors.append(event.error)
            case TextWritten():
                self.texts.append(event.text)
                self.tokens = event.tokens

    @property
    def over(self) -> bool:
        return len(self.done) + len(self.errors) == 1


def scheduler(engine: BagelEngine, max_num_seqs: int = 4, max_model_len: int = 4096) -> TextScheduler:
    loaded = replace(engine.loaded, max_model_len=max_model_len)
    builder = ContextBuilder(engine.model)
    return TextScheduler(loaded, builder, kv_space(engine.model, None), max_num_seqs=max_num_seqs)


def ask(
    at: TextScheduler, prompt: str, max_tokens: int = 3, *, append: bool = False, failing: type | None = None
) -> Heard:
    """A request that writes a text, begun; and what it will emit."""
    heard = Heard(failing=failing)
    chain = at._loaded.planner.append_text(Chain(), prompt)
    at.add(ContextRequest(chain, 1, heard.emit, TextSettings(max_tokens=max_tokens), append=append))
    return heard


def finish(at: TextScheduler) -> None:
    for _ in range(200):
        if not at.busy:
            return
        at.work()
    raise AssertionError("readings are left that never end")


def test_a_text_that_memory_runs_out_for_ends_alone(engine: BagelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    at = scheduler(engine)
    add = TextBatch.add

    def full(batch: TextBatch, run: TextRun) -> None:
        if run.settings.max_tokens == 7:
            raise torch.OutOfMemoryError
        add(batch, run)

    monkeypatch.setattr(TextBatch, "add", full)
    one, huge, other = ask(at, "a red cup"), ask(at, "a whole library", 7), ask(at, "a blue cup")
    finish(at)
    assert [(len(heard.done[0].token_ids), heard.tokens) for heard in (one, other)] == [(3, 3), (3, 3)]
    assert huge.over and isinstance(huge.errors[0], RuntimeError)
    later = ask(at, "a red cup")
    finish(at)
    assert later.done[0].token_ids == one.done[0].token_ids


def test_a_text_that_can_never_have_room_is_refused_at_once(engine: BagelEngine) -> None:
    at = scheduler(engine)
    with pytest.raises(InvalidRequest, match="kv_device_bytes"):
        ask(at, "a whole library", 2**31)
    assert not at.busy


@pytest.mark.parametrize("failing", [TextWritten, ContextDone, ChainExtended, LayersComputed])
def test_a_request_whose_receiver_fails_ends_alone(engine: BagelEngine, failing: type) -> None:
    at = scheduler(engine)
    broken = ask(at, "a red cup", append=failing is ChainExtended, failing=failing)
    other = ask(at, "a blue cup")
    finish(at)
    assert [str(error) for error in broken.errors] == ["gone"] and not broken.done
    assert len(other.done[0].token_ids) == 3


def test_a_think_text_beyond_the_last_position_ends_alone(engine: BagelEngine) -> None:
    at = scheduler(engine, max_model_len=8)
    long = ask(at, "a red cup", 12, append=True)
    other = ask(at, "a blue cup")
    finish(at)
    assert isinstance(long.errors[0], InvalidRequest) and long.over
    assert len(other.done[0].token_ids) == 3


def test_what_is_abandoned_ends_once_and_holds_nothing(engine: BagelEngine) -> None:
    at = scheduler(engine, max_num_seqs=1)
    every = [ask(at, f"cup number {number}", 50) for number in range(3)]
    for _ in range(3):  # one is written, one waits for its place
        at.work()
    every.append(ask(at, "not begun"))
    at.abandon(BagelError("the engine failed"))
    assert all(heard.over and str(heard.errors[0]) == "the engine failed" for heard in every)
    assert not at.busy
    next_ = ask(at, "a red cup")
    finish(at)
    assert len(next_.done[0].token_ids) == 3


def test_a_text_whose_logits_are_no_numbers_ends_and_the_others_go_on(
    engine: BagelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = scheduler(engine, max_num_seqs=5)
    alone = ask(at, "a cup", 12)
    finish(at)
    told = [ask(at, "a cup", 12) for _ in range(4)]
    fine = ask(at, "a cup", 12)
    forward, odd = at.texts._forward, (float("nan"), float("-inf"), float("inf"))

    def overflow() -> tuple[torch.Tensor, torch.Tensor]:
        logits, _ = forward()
        if len(logits) > len(odd):
            for row, value in enumerate(odd):
                logits[row, 5:] = value
            logits[len(odd)] = float("-inf")
        return logits, best(logits)

    monkeypatch.setattr(at.texts, "_forward", overflow)
    finish(at)
    for each in told:
        (error,) = each.errors
        assert isinstance(error, NotFinite) and "use float32" in str(error)
    assert fine.texts == alone.texts and len(fine.done) == 1
