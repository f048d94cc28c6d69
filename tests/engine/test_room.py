"""K/V on a device are bounded: what finds no room waits for it, what never will is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.engine.commands import AddPicture, Begin, LandedPage, LoadPages, PlacedContext, Remove, StepPlan
from bagel.engine.events import Begun, Done, Drawn, Event, Failed, Stepped
from bagel.engine.slab import NoRoom, SharedSlab
from bagel.images.output import OutputFormat
from bagel.model.attention import KvShape
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from tests.engine.driven import Driven, driven, failures, of

TOKEN_BYTES = 1024
"""K/V of a token of the recordings' model: 4 layers, 2 heads of 16, float32, twice."""
SETTINGS = ImageSettings(steps=3, cfg_text_scale=1.0)


def finish(engine: Driven, *ids: int) -> list[Event]:
    """Take all steps of pictures of three timesteps, until they are there."""
    events: list[Event] = []
    for _ in range(2):
        engine.send(StepPlan(ids, read=False))
        events += engine.until(Stepped)
    while len(of(events, Drawn)) < len(ids):
        events += engine.until(Drawn)
    return events


def finish_one(engine: Driven, id_: int, *, then: int) -> list[Event]:
    """Take a picture's steps; one that waited begins then, and no other."""
    events = finish(engine, id_)
    if not of(events, Begun):
        events += engine.until(Begun)
    assert of(events, Begun) == [then]
    return events


def drawn(events: list[Event]) -> dict[int, object]:
    return {event.id: event.picture for event in events if isinstance(event, Drawn)}


def ask(engine: Driven, id_: int, **options: int) -> list[Event]:
    """Ask for a picture; what comes of it until its prompt is read."""
    engine.begin(id_, "text2img", steps=3, cfg_text_scale=1, **options)
    return engine.read()


def test_pictures_wait_for_room_in_their_order_and_come_out_the_same() -> None:
    with driven() as engine:
        for id_, width in ((1, 64), (2, 192), (3, 64)):
            assert of(ask(engine, id_, width=width), Begun) == [id_]
        wanted = drawn([event for id_ in (1, 2, 3) for event in finish(engine, id_)])
    with driven(kv_device_bytes=80 * TOKEN_BYTES) as engine:
        assert of(ask(engine, 1, width=64), Begun) == [1]
        assert not of(ask(engine, 2, width=192), Begun)
        assert not of(ask(engine, 3, width=64), Begun)  # there would be room, but 2 was here before
        ours = finish_one(engine, 1, then=2) + finish_one(engine, 2, then=3) + finish(engine, 3)
        assert drawn(ours) == wanted
        assert not engine.engine.space.taken


def test_a_picture_that_leaves_the_line_lets_the_next_one_in() -> None:
    with driven(kv_device_bytes=60 * TOKEN_BYTES) as engine:
        for id_ in (1, 2, 3):
            ask(engine, id_, width=128)
        engine.send(Remove(2))
        engine.send(Remove(1))
        assert of(engine.until(Begun), Begun) == [3]


def test_a_text_waits_for_room_too() -> None:
    with driven(kv_device_bytes=60 * TOKEN_BYTES) as engine:
        assert of(ask(engine, 1, width=128), Begun) == [1]
        engine.begin(2, max_tokens=30)
        engine.send(StepPlan((1,), read=True))
        events = engine.until(Stepped)
        engine.send(StepPlan((1,), read=True))
        events += engine.until(Stepped)
        assert not of(events, Done)
        assert of(engine.read(), Done) == [2]


@pytest.mark.parametrize(
    ("modality", "options"),
    [
        ("text2img", {"width": 512}),
        ("text2img", {"think": True, "max_think_tokens": 200}),
        ("text2text", {"max_tokens": 200}),
    ],
)
def test_what_can_never_fit_is_refused_before_anything_is_computed(modality: str, options: dict[str, int]) -> None:
    with driven(kv_device_bytes=100 * TOKEN_BYTES) as engine:
        refused = engine.begin(1, modality, **options)
        assert "which holds 100 (kv_device_bytes)" in failures([refused])[1]


def test_pages_that_land_while_a_picture_waits_are_drawn_from(checkpoint: Checkpoint) -> None:
    llm, length = checkpoint.config.llm, 5
    kv = torch.randn(2, llm.num_hidden_layers, length, llm.num_key_value_heads, llm.head_dim)
    layer = kv[0, 0].nbytes
    pages = tuple(
        LandedPage(BranchName.GEN, i, 0, length, i * layer, (llm.num_hidden_layers + i) * layer)
        for i in range(llm.num_hidden_layers)
    )
    picture = AddPicture(
        1, SETTINGS, (4, 4), 7, (), {BranchName.GEN: PlacedContext(b"a", length, length)}, OutputFormat("PNG")
    )
    with driven(kv.view(torch.uint8).flatten(), kv_device_bytes=40 * TOKEN_BYTES) as engine:
        for id_ in (1, 2):
            engine.send(replace(picture, id=id_))
            engine.send(LoadPages(id_, pages[:2]))
            engine.send(LoadPages(id_, pages[2:]))
            engine.send(Begin(id_))
        assert of(engine.until(Begun), Begun) == [1]
        first = finish_one(engine, 1, then=2)
        assert drawn(finish(engine, 2))[2] == drawn(first)[1]
        engine.send(replace(picture, id=3, grid=(8, 8)))
        assert "takes 71 tokens of K/V on the device, which holds 40" in failures(engine.until(Failed))[3]


def test_a_slab_of_a_fixed_size_takes_all_or_nothing() -> None:
    slab = SharedSlab(KvShape(2, 1, 8), dtype=torch.float32, device=torch.device("cpu"), size=10)
    assert slab.take_all([4, 4]) == [0, 4]
    with pytest.raises(NoRoom):
        slab.take_all([1, 4])
    slab.give(0)
    assert slab.taken == 4
    assert not slab.has_room("large", [5]) and not slab.has_room("small", [1])
    assert slab.spare == 10 and slab.slab.k.shape[1] == 11  # there even when all is taken
    slab.withdraw("large")
    assert slab.has_room("small", [4, 2]) and slab.take_all([4, 2]) == [0, 8]
