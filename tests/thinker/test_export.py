"""Computed K/V on their way to the store: all there before a context is done, and nobody waits for them but that."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest
import torch

from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import (
    ContextDone,
    ContextEvent,
    ContextFailed,
    ContextRequest,
    PromptComputed,
    TextWritten,
)
from bagel.errors import UnknownSegment
from bagel.kv.store import KvStore
from bagel.request import TextSettings
from bagel_thinker.export import KvLane
from bagel_thinker.torch_engine import TorchEngine

LIMIT_S = 30


class Asked:
    """A request of a text, and its events."""

    def __init__(
        self, engine: TorchEngine, text: str, settings: TextSettings | None = None, *, kv: bool = True
    ) -> None:
        self.events: SimpleQueue[ContextEvent] = SimpleQueue()
        self.chain: Chain = engine.planner.append_text(Chain(), text)
        if kv:
            self.lease = engine.store.lease(self.chain.lengths, 60)
        self.request = ContextRequest(self.chain, 1, self.events.put, settings)
        engine.submit(self.request)

    def until(self, *kinds: type) -> list[ContextEvent]:
        """Events up to the first of these kinds."""
        events = [self.events.get(timeout=LIMIT_S)]
        while not isinstance(events[-1], kinds):
            events.append(self.events.get(timeout=LIMIT_S))
        return events


def held_up(engine: TorchEngine) -> Callable[[], None]:
    """Keep the lane's thread busy until the function is called."""
    reached, go_on = Event(), Event()

    def wait() -> None:
        reached.set()
        go_on.wait(LIMIT_S)

    engine._lane.after(wait)
    assert reached.wait(LIMIT_S)
    return go_on.set


def test_a_context_is_done_when_all_of_it_is_in_the_store(engine: TorchEngine) -> None:
    go_on = held_up(engine)
    asked = Asked(engine, "a red cup")
    Asked(engine, "a blue cup", TextSettings(max_tokens=2), kv=False).until(ContextDone)  # no text waits for it
    assert asked.events.empty() and not engine.store.ready_pages(asked.chain.digest)
    go_on()
    (done,) = asked.until(ContextDone)
    assert isinstance(done, ContextDone) and engine.store.is_complete(asked.chain.digest)
    computed, stored = done.context.kv[0], engine.store.load(asked.chain.digest)
    assert computed.k.equal(stored[0]) and computed.v.equal(stored[1])
    (times,) = done.layer_times.values()
    assert sorted(times) == list(times)


def test_events_of_a_text_keep_their_order_behind_its_kv(engine: TorchEngine) -> None:
    go_on = held_up(engine)
    asked = Asked(engine, "a red cup", TextSettings(max_tokens=3))
    other = Asked(engine, "a blue cup", TextSettings(max_tokens=5), kv=False)
    other.until(ContextDone)
    assert asked.events.empty()
    go_on()
    events = asked.until(ContextDone)
    assert isinstance(events[0], PromptComputed)
    tokens = [event.tokens for event in events if isinstance(event, TextWritten)]
    assert tokens == sorted(tokens)


def test_a_known_context_goes_to_the_store_again(engine: TorchEngine) -> None:
    """As after its store has dropped it: what the device still has is written, and not computed."""
    first = Asked(engine, "a red cup")
    first.until(ContextDone)
    engine.store.release([first.lease])
    room = engine.store.capacity_bytes // engine.store.layout.segment_bytes(1)
    engine.store.release([engine.store.lease([(b"o" * 16, room)], 60)])
    assert not engine.store.is_complete(first.chain.digest)
    (done,) = Asked(engine, "a red cup").until(ContextDone)
    assert isinstance(done, ContextDone) and not done.computed
    assert engine.store.is_complete(first.chain.digest)


def test_a_context_that_the_store_has_is_not_copied_to_the_device(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Asked(engine, "a red cup").until(ContextDone)
    engine._texts.builder.cache._near.clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(KvStore, "load", lambda *_: pytest.fail("nobody needs it there"))
    (done,) = Asked(engine, "a red cup").until(ContextDone)
    assert isinstance(done, ContextDone) and not done.computed and not done.context.kv


def test_a_layer_that_the_store_refuses_fails_its_request_alone(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, refused = KvStore.mark_layer, Asked(engine, "before").chain.digest

    def refuse(store: KvStore, digest: bytes, layer: int) -> Any:
        if digest == refused and layer == 1:
            raise UnknownSegment("it is gone")
        return mark(store, digest, layer)

    refused = engine.planner.append_text(Chain(), "a red cup").digest
    monkeypatch.setattr(KvStore, "mark_layer", refuse)
    asked = Asked(engine, "a red cup")
    other = Asked(engine, "a blue cup")
    (failed,) = asked.until(ContextFailed)
    assert isinstance(failed, ContextFailed) and isinstance(failed.error, UnknownSegment)
    other.until(ContextDone)
    monkeypatch.undo()
    engine.store.release([asked.lease])
    again = Asked(engine, "a red cup")
    again.until(ContextDone)
    assert engine.store.is_complete(refused)


def test_a_lane_that_hangs_is_no_idle_engine(engine: TorchEngine) -> None:
    go_on = held_up(engine)
    assert engine.pulse.step is not None
    go_on()
    engine._lane.wait()


def test_layers_that_are_computed_at_once_are_all_stored_but_those_that_are_there(engine: TorchEngine) -> None:
    lane, digest, layout = KvLane(engine.store, engine._loaded.model.device), b"a" * 16, engine.store.layout
    engine.store.lease([(digest, 2)], 60)
    k, v = torch.randn(2, layout.layers, 2, layout.kv_heads, layout.head_dim)
    there = torch.ones_like(k[1])
    errors = list[Exception | None]()
    assert lane.claim(digest)
    engine.store.write_layer(digest, 1, there, there)
    lane.copy(digest, range(layout.layers), k, v, errors.append)
    lane.release(digest)
    lane.wait()
    assert errors == [None]
    k[1] = v[1] = there
    for stored, computed in zip(engine.store.load(digest), (k, v), strict=True):
        assert stored.equal(computed)
    lane.close()


def test_unfinished_segments_are_for_others_to_fill(engine: TorchEngine) -> None:
    lane, digest = KvLane(engine.store, engine._loaded.model.device), b"a" * 16
    engine.store.lease([(digest, 2)], 60)
    assert lane.claim(digest) and not lane.claim(digest)
    lane.release(digest)
    lane.wait()
    assert engine.store.claim(digest)
    lane.close()
