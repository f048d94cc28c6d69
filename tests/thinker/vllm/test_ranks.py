"""What the vLLM engine makes of its ranks' notices. Its core is replaced, so that this needs no vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.deployment.defaults import NANO_FOLDERS
from bagel.engine.text_scheduler import ContextDone, ContextRequest
from bagel.errors import IncompleteContext, NotFinite, StoreFull
from bagel.prompts import TextPart
from bagel.request import TextSettings
from bagel_thinker.vllm import engine as engine_module
from bagel_thinker.vllm.engine import VllmEngine
from bagel_thinker.vllm.settings import VllmSettings
from bagel_thinker.vllm.sink import Notice, Outlet
from tests.helpers import keep_in

RANKS = 2
LIMIT_S = 20


class Core:
    """In vLLM's place: every request ends in the next step. The ranks write and tell, by the pipe, when the test says.

    exports: of each request, (digest in hexadecimal, first row, length, offset in the store) of what is to be copied.
    """

    block_size = 16

    def __init__(self, config: Any, settings: Any, ids: Any, model: Any, sink: dict[str, Any], broken: Any) -> None:
        elsewhere = {**sink, "name": "of another process"}
        self.ranks = [Outlet.find(elsewhere) for _ in range(RANKS)]
        self.exports: dict[str, list[tuple[str, int, int, int]]] = {}
        self.aborted: list[str] = []
        self._new: list[str] = []
        self.token, self.overflowed = 1, 0

    @property
    def busy(self) -> bool:
        return bool(self._new)

    def add(self, name: str, chain: Any, *, extra: dict[str, Any], **_: Any) -> None:
        self.exports[name] = extra["kv_transfer_params"]["exports"]
        self._new.append(name)

    def step(self) -> list[Any]:
        ended, self._new = self._new, []
        made = {"new_token_ids": [self.token], "finish_reason": "length", "prefill_stats": None}
        return [SimpleNamespace(request_id=name, **made) for name in ended]

    def overflows(self) -> int:
        return self.overflowed

    def abort(self, names: Sequence[str]) -> None:
        self.aborted += names

    def close(self) -> None:
        pass


class Stand:
    """An engine over two ranks whose notices the test sends."""

    def __init__(self, checkpoint: Checkpoint, kv_store_bytes: int = 2**18) -> None:
        settings = VllmSettings("cpu", "float32", max_num_seqs=4, max_model_len=600, tensor_parallel_size=RANKS)
        self.engine = VllmEngine(checkpoint, settings, model_name="tiny", kv_store_bytes=kv_store_bytes)
        self.received, on_notice = 0, self.engine._sink.on_notice

        def count(notice: Notice) -> None:
            on_notice(notice)
            self.received += 1

        self.engine._sink.on_notice = count
        self.sent = 0
        self.came: list[ContextDone | Exception] = []

    @property
    def core(self) -> Core:
        core: Any = self.engine._core
        assert isinstance(core, Core)
        return core

    def read(self, words: str, settings: TextSettings | None = None) -> tuple[ContextRequest, str]:
        """A reading under way, and the lease of its context."""
        planner = self.engine.planner
        prompt = (TextPart(words),)
        chain = planner.chain(prompt, {})
        lease = self.engine.store.lease(chain.lengths, 600)
        reading, before = ContextRequest(chain, 7, keep_in(self.came), settings), len(self.core.exports)
        self.engine.submit(reading)
        until(lambda: len(self.core.exports) > before)
        return reading, lease

    def write(self, rank: int, name: str, *, layers: int | None = None) -> None:
        """A rank writes its number into its half of the heads of the first layers, all if not said."""
        outlet, layout = self.core.ranks[rank], self.engine.store.layout
        half = layout.kv_heads // RANKS
        for digest, _, length, offset in self.core.exports[name]:
            for layer in range(layout.layers if layers is None else layers):
                nbytes = layout.layer_bytes(length)
                memory = outlet.arena.slice(offset + layer * nbytes, nbytes)
                rows = torch.frombuffer(memory, dtype=torch.float32).view(2, length, layout.kv_heads, layout.head_dim)
                rows[:, :, rank * half : (rank + 1) * half] = rank + 1
                self.send(Notice(name, rank=rank, digest=digest, layer=layer))

    def send(self, notice: Notice) -> None:
        self.core.ranks[notice.rank].send(notice)
        self.sent += 1

    def settle(self) -> None:
        """Wait until the engine has handled every notice sent so far."""
        until(lambda: self.received == self.sent)
        handled = threading.Event()
        self.engine._commands.put(handled.set)
        assert handled.wait(LIMIT_S)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def stand(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    monkeypatch.setattr(engine_module, "Core", Core)
    stand = Stand(checkpoint)
    yield stand
    stand.engine.close()


@pytest.mark.parametrize("first", range(RANKS))
def test_a_reading_waits_for_the_rank_that_is_last(stand: Stand, first: int) -> None:
    reading, _ = stand.read("a red cube")
    (name,) = stand.core.exports
    stand.write(first, name)
    stand.send(Notice(name, rank=first, over=True))
    stand.settle()
    assert not stand.came and name in stand.engine._requests
    stand.write(1 - first, name)
    stand.send(Notice(name, rank=1 - first, over=True))
    stand.settle()
    (came,) = stand.came
    assert isinstance(came, ContextDone) and not stand.engine._requests
    k, v = stand.engine.store.load(reading.chain.segments[0].digest)
    half = k.shape[2] // RANKS
    assert all((part[:, :, :half] == 1).all() and (part[:, :, half:] == 2).all() for part in (k, v))
    assert not any(segment.pins for segment in stand.engine.store._ledger.segments.values())


def test_memory_is_given_away_only_when_no_rank_writes(stand: Stand) -> None:
    reading, lease = stand.read("word " * 60)
    (name,) = stand.core.exports
    store, whole = stand.engine.store, stand.engine.store.capacity_bytes
    most = whole // store.layout.segment_bytes(1)
    stand.write(0, name, layers=1)
    stand.engine.cancel(reading)
    store.release([lease])
    stand.send(Notice(name, rank=0, over=True))
    stand.settle()
    with pytest.raises(StoreFull):
        store.lease([(b"o" * 16, most)], 9)
    stand.write(1, name, layers=1)
    stand.send(Notice(name, rank=1, over=True))
    stand.settle()
    store.lease([(b"o" * 16, most)], 9)
    assert not stand.came


def test_a_rank_that_leaves_something_out_fails_the_reading(stand: Stand) -> None:
    stand.read("a red cube")
    (name,) = stand.core.exports
    stand.write(0, name)
    stand.write(1, name, layers=1)
    for rank in range(RANKS):
        stand.send(Notice(name, rank=rank, over=True))
    stand.settle()
    (came,) = stand.came
    assert isinstance(came, IncompleteContext) and not stand.engine._requests


def test_an_overflow_is_told_where_texts_use_all_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bagel-nano's do: the id that stands for an overflow may be a text's own then, which the count decides."""
    monkeypatch.setattr(engine_module, "Core", Core)
    stand = Stand(Checkpoint(NANO_FOLDERS[1]), 2**24)
    try:
        core, writing = stand.core, TextSettings(max_tokens=1)
        core.token = stand.engine.planner.config.llm.vocab_size - 1

        def came(words: str, settings: TextSettings | None, overflown: int) -> ContextDone | Exception:
            stand.came.clear()
            core.overflowed += overflown
            stand.read(words, settings)
            name = list(core.exports)[-1]
            for rank in range(RANKS):
                stand.write(rank, name)
                stand.send(Notice(name, rank=rank, over=True))
            stand.settle()
            (ended,) = stand.came
            return ended

        assert isinstance(came("a red cube", writing, 0), ContextDone)
        assert isinstance(came("a blue cube", writing, 1), NotFinite)
        assert isinstance(came("a green cube", None, 1), ContextDone)  # its logits are nobody's
        assert isinstance(came("a black cube", writing, 0), ContextDone)
    finally:
        stand.engine.close()
