"""K/V on their way from shared memory to the slab: the right rows, beside the steps of others, and none too late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.engine.arrivals import Arrival, Arrivals
from bagel.engine.commands import AddPicture, Begin, LandedPage, LoadPages, PlacedContext, Remove, StepPlan
from bagel.engine.events import Begun, Stepped, StepTaken
from bagel.engine.host_memory import Staging
from bagel.engine.progress import Heartbeat
from bagel.images.output import OutputFormat
from bagel.model.attention import KvShape, KvSlab
from bagel.parallel.mesh import Share
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from tests.engine.driven import driven, failures, of

LIMIT_S = 30
LAYERS, HEADS, WIDTH, TOKENS = 3, 4, 8, 10
ROW_BYTES = HEADS * WIDTH * 4
ALL = Share.all(HEADS)


@contextmanager
def arrivals(
    heads: Share = ALL, on_layers: Callable[[int], None] = lambda id_: None
) -> Iterator[tuple[Arrivals, KvSlab, torch.Tensor, dict[int, Exception]]]:
    """Copies into a slab of 20 tokens, out of memory with K and V of each layer, [layers, 2, tokens, heads, width]."""
    kv = torch.randn(LAYERS, 2, TOKENS, HEADS, WIDTH)
    shape = KvShape(LAYERS, heads.count, WIDTH)
    slab = KvSlab(shape, 20, dtype=torch.float32, device=torch.device("cpu"))
    failed: dict[int, Exception] = {}
    made = Arrivals(slab, kv.view(torch.uint8).flatten(), heads, Heartbeat(), failed.__setitem__, on_layers)
    yield made, slab, kv, failed
    made.close()


def page(layer: int, row: int, rows: int) -> LandedPage:
    begin = layer * 2 * TOKENS * ROW_BYTES + row * ROW_BYTES
    return LandedPage(BranchName.GEN, layer, row, rows, begin, begin + TOKENS * ROW_BYTES)


def copied(made: Arrivals, arrival: Arrival) -> None:
    """Wait until everything that was handed in is copied."""
    done = Event()
    made.finish(arrival, done.set)
    assert done.wait(LIMIT_S)


@pytest.mark.parametrize("heads", [ALL, Share(1, 3, HEADS)], ids=["all heads", "a rank's heads"])
def test_rows_reach_their_places(heads: Share) -> None:
    with arrivals(heads) as (made, slab, kv, _):
        arrival = made.open(1, lambda branch: 5, TOKENS)
        made.copy(arrival, [page(layer, 0, 6) for layer in range(LAYERS)])
        made.copy(arrival, [page(layer, 6, 4) for layer in range(LAYERS)])
        copied(made, arrival)
        for i, tensor in enumerate((slab.k, slab.v)):
            assert tensor[:, 5:15].equal(kv[:, i, :, heads.start : heads.stop])
            assert not tensor[:, :5].any() and not tensor[:, 15:].any()


@pytest.mark.parametrize("early", [False, True], ids=["by the end", "by its first layers"])
def test_branches_that_begin_alike_both_have_their_rows(early: bool) -> None:
    places = {BranchName.GEN: 0, BranchName.CFG_TEXT: 12}
    with arrivals() as (made, slab, kv, _):
        arrival = made.open(1, places.__getitem__, TOKENS + 6)
        shared = [page(layer, 0, 6) for layer in range(LAYERS)]
        own = [page(layer, 6, 4) for layer in range(LAYERS)]
        made.copy(arrival, [*shared, *own, *(replace(each, branch=BranchName.CFG_TEXT) for each in shared)])
        if early:
            copied(made, made.open(2, lambda branch: 0, TOKENS))  # which comes after it
            assert made.reach(arrival) == LAYERS
        else:
            copied(made, arrival)
        for i, tensor in enumerate((slab.k, slab.v)):
            assert tensor[:, :10].equal(kv[:, i])
            assert tensor[:, 12:18].equal(kv[:, i, :6])
            assert not tensor[:, 10:12].any() and not tensor[:, 18:].any()


def test_a_layer_is_there_after_those_before_it_and_with_the_rows_of_all_branches() -> None:
    places = {BranchName.GEN: 0, BranchName.CFG_TEXT: 12}
    told: list[int] = []
    with arrivals(on_layers=told.append) as (made, *_):
        arrival = made.open(1, places.__getitem__, TOKENS + 6)

        def lands(layer: int, branch: BranchName, rows: int) -> int:
            made.copy(arrival, [replace(page(layer, 0, rows), branch=branch)])
            copied(made, made.open(2, lambda branch: 0, TOKENS))  # which comes after it
            return made.reach(arrival)

        assert lands(1, BranchName.GEN, TOKENS) == lands(1, BranchName.CFG_TEXT, 6) == 0
        assert lands(0, BranchName.GEN, TOKENS) == 0 and not told
        assert lands(0, BranchName.CFG_TEXT, 6) == 2 and told == [1]
        assert lands(2, BranchName.GEN, TOKENS) == 2
        assert lands(2, BranchName.CFG_TEXT, 6) == LAYERS
        assert told == [1]  # of the last layers nobody needs to be told: the picture begins


def blocked(made: Arrivals) -> Callable[[], None]:
    """Keep the thread busy until the function is called."""
    reached, go_on = Event(), Event()

    def wait() -> None:
        reached.set()
        go_on.wait(LIMIT_S)

    made.finish(made.open(99, lambda branch: 0, TOKENS), wait)
    assert reached.wait(LIMIT_S)
    return go_on.set


def test_nothing_is_written_to_a_place_that_was_given_up() -> None:
    with arrivals() as (made, slab, _, failed):
        go_on, calls = blocked(made), list[str]()
        arrival = made.open(1, lambda branch: 5, TOKENS)
        made.copy(arrival, [page(0, 0, TOKENS)])
        made.finish(arrival, lambda: calls.append("begun"))
        made.drop(arrival)
        go_on()
        copied(made, made.open(2, lambda branch: 0, TOKENS))
        assert not slab.k.any() and not slab.v.any()
        assert not calls and not failed


def test_a_page_that_cannot_be_copied_fails_its_picture_alone() -> None:
    with arrivals() as (made, slab, kv, failed):
        broken, whole = made.open(1, lambda branch: 0, TOKENS), made.open(2, lambda branch: 10, TOKENS)
        made.copy(broken, [replace(page(0, 0, TOKENS), k_offset=10**9)])
        made.finish(broken, lambda: failed.__setitem__(3, ValueError("it has not landed")))
        made.copy(whole, [page(0, 0, TOKENS)])
        copied(made, whole)
        assert failed.keys() == {1}
        assert slab.k[0, 10:].equal(kv[0, 0])


@pytest.mark.parametrize("nbytes", [3 * ROW_BYTES, 100 * ROW_BYTES])
def test_rows_go_through_staging_buffers_in_pieces(nbytes: int) -> None:
    source = torch.randn(20, HEADS, WIDTH)[:, 1:3]
    target = torch.zeros(20, 2, WIDTH)
    Staging(torch.device("cpu"), nbytes, count=2).copy(target, source)
    assert target.equal(source)


def test_a_picture_takes_steps_while_the_kv_of_another_are_copied(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, length = checkpoint.config.llm, 5
    kv = torch.randn(2, llm.num_hidden_layers, length, llm.num_key_value_heads, llm.head_dim)
    layer = kv[0, 0].nbytes
    pages = tuple(
        LandedPage(BranchName.GEN, i, 0, length, i * layer, (llm.num_hidden_layers + i) * layer)
        for i in range(llm.num_hidden_layers)
    )
    contexts = {BranchName.GEN: PlacedContext(b"a", length, length)}
    settings = ImageSettings(steps=5, cfg_text_scale=1.0)
    right, copying, go_on = Arrivals._copy_rows, Event(), Event()

    def slow(self: Arrivals, target: torch.Tensor, offset: int) -> None:
        copying.set()
        assert go_on.wait(LIMIT_S)
        right(self, target, offset)

    with driven(kv.view(torch.uint8).flatten()) as engine:
        for id_ in (1, 2, 3):
            engine.send(AddPicture(id_, settings, (4, 4), 7, (), contexts, OutputFormat("PNG")))
        engine.send(LoadPages(1, pages))
        engine.send(Begin(1))
        assert of(engine.until(Begun), Begun) == [1]
        monkeypatch.setattr(Arrivals, "_copy_rows", slow)
        for command in (LoadPages(2, pages), Begin(2), LoadPages(3, pages), Begin(3)):
            engine.send(command)
        assert copying.wait(LIMIT_S)
        engine.send(StepPlan((1,), read=False))
        events = engine.until(Stepped)
        assert of(events, StepTaken) == [1] and not of(events, Begun) and not failures(events)
        go_on.set()
        assert of(engine.until(Begun), Begun) == [2]
        engine.send(Remove(2))
        assert of(engine.until(Begun), Begun) == [3]
