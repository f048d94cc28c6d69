"""K/V on a runner's device are bounded: who finds no room waits for it, who never will is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.engine.slab import NoRoom, SharedSlab
from bagel.kv.arena import Arena
from bagel.model.attention import KvShape
from bagel.prompts import BranchName
from bagel.request import ImageSettings
from bagel_dit.messages import (
    AddPicture,
    Begin,
    Begun,
    Done,
    Drawn,
    Failed,
    Land,
    LandedPage,
    Output,
    PlacedContext,
    Remove,
    Reply,
    Stepped,
    StepPlan,
)
from tests.dit.runner_server import Server, failures, of, serving

TOKEN_BYTES = 1024
"""K/V of a token of the recordings' model: 4 layers, 2 heads of 16, float32, twice."""
SETTINGS = ImageSettings(steps=3, cfg_text_scale=1.0)


def finish(server: Server, *ids: int) -> list[Reply]:
    """Take all steps of pictures of three timesteps, until they are there."""
    replies: list[Reply] = []
    for _ in range(2):
        server.send(StepPlan(ids, read=False))
        replies += server.until(Stepped)
    while len(of(replies, Drawn)) < len(ids):
        replies += server.until(Drawn)
    return replies


def finish_one(server: Server, id_: int, *, then: int) -> list[Reply]:
    """Take a picture's steps; one that waited begins then, and no other."""
    replies = finish(server, id_)
    if not of(replies, Begun):
        replies += server.until(Begun)
    assert of(replies, Begun) == [then]
    return replies


def drawn(replies: list[Reply]) -> dict[int, bytes]:
    return {reply.id: reply.data for reply in replies if isinstance(reply, Drawn)}


def ask(server: Server, id_: int, **options: int) -> list[Reply]:
    """Ask for a picture; what comes of it until its prompt is read."""
    server.begin(id_, "text2img", steps=3, cfg_text_scale=1, **options)
    return server.read()


def test_pictures_wait_for_room_in_their_order_and_come_out_the_same() -> None:
    with serving() as server:
        for id_, width in ((1, 64), (2, 192), (3, 64)):
            assert of(ask(server, id_, width=width), Begun) == [id_]
        wanted = drawn([reply for id_ in (1, 2, 3) for reply in finish(server, id_)])
    with serving(kv_device_bytes=80 * TOKEN_BYTES) as server:
        assert of(ask(server, 1, width=64), Begun) == [1]
        assert not of(ask(server, 2, width=192), Begun)
        assert not of(ask(server, 3, width=64), Begun)  # there would be room, but 2 was here before
        ours = finish_one(server, 1, then=2) + finish_one(server, 2, then=3) + finish(server, 3)
        assert drawn(ours) == wanted
        assert server.runner is not None and not server.runner._space.taken


def test_a_picture_that_leaves_the_line_lets_the_next_one_in() -> None:
    with serving(kv_device_bytes=60 * TOKEN_BYTES) as server:
        for id_ in (1, 2, 3):
            ask(server, id_, width=128)
        server.send(Remove(2))
        server.send(Remove(1))
        assert of(server.until(Begun), Begun) == [3]


def test_a_text_waits_for_room_too() -> None:
    with serving(kv_device_bytes=60 * TOKEN_BYTES) as server:
        assert of(ask(server, 1, width=128), Begun) == [1]
        server.begin(2, max_tokens=30)
        server.send(StepPlan((1,), read=True))
        replies = server.until(Stepped)
        server.send(StepPlan((1,), read=True))
        replies += server.until(Stepped)
        assert not of(replies, Done)
        assert of(server.read(), Done) == [2]


@pytest.mark.parametrize(
    ("modality", "options"),
    [
        ("text2img", {"width": 512}),
        ("text2img", {"think": True, "max_think_tokens": 200}),
        ("text2text", {"max_tokens": 200}),
    ],
)
def test_what_can_never_fit_is_refused_before_anything_is_computed(modality: str, options: dict[str, int]) -> None:
    with serving(kv_device_bytes=100 * TOKEN_BYTES) as server:
        with pytest.raises(AssertionError):
            server.begin(1, modality, **options)
        assert isinstance(server.replies[-1], Failed)
        assert "which holds 100 (kv_device_bytes)" in failures(server.replies)[1]


def test_pages_that_land_while_a_picture_waits_are_drawn_from(checkpoint: Checkpoint) -> None:
    llm, length = checkpoint.config.llm, 5
    kv = torch.randn(2, llm.num_hidden_layers, length, llm.num_key_value_heads, llm.head_dim)
    arena = Arena(kv.nbytes)
    torch.frombuffer(arena.buffer, dtype=torch.uint8)[: kv.nbytes] = kv.view(torch.uint8).flatten()
    layer = kv[0, 0].nbytes
    pages = tuple(
        LandedPage(BranchName.GEN, i, 0, length, i * layer, (llm.num_hidden_layers + i) * layer)
        for i in range(llm.num_hidden_layers)
    )
    picture = AddPicture(1, SETTINGS, (4, 4), 7, (), {BranchName.GEN: PlacedContext(b"a", length, length)}, Output())
    with serving(arena, kv_device_bytes=40 * TOKEN_BYTES) as server:
        for id_ in (1, 2):
            server.send(replace(picture, id=id_))
            server.send(Land(id_, pages[:2]))
            server.send(Land(id_, pages[2:]))
            server.send(Begin(id_))
        assert of(server.until(Begun), Begun) == [1]
        first = finish_one(server, 1, then=2)
        assert drawn(finish(server, 2))[2] == drawn(first)[1]
        server.send(replace(picture, id=3, grid=(8, 8)))
        assert "takes 71 tokens of K/V on the DiT's device, which holds 40" in failures(server.until(Failed))[3]


def test_a_slab_of_a_fixed_size_takes_all_or_nothing() -> None:
    slab = SharedSlab(KvShape(2, 1, 8), dtype=torch.float32, device=torch.device("cpu"), size=10)
    assert slab.take_all([4, 4]) == [0, 4]
    with pytest.raises(NoRoom):
        slab.take_all([1, 4])
    slab.give(0)
    assert slab.taken == 4
    assert not slab.has_room("large", [5]) and not slab.has_room("small", [1])
    assert slab.spare() == 10 and slab.slab.k.shape[1] == 11  # there even when all is taken
    slab.withdraw("large")
    assert slab.has_room("small", [4, 2]) and slab.take_all([4, 2]) == [0, 8]
