"""Weights that ranks divide (HSDP): forwards to the bit as of a whole model, and no rank with more than its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.model.bagel import Bagel
from bagel.model.linear import Quantization
from bagel.model.naming import kept, slots
from bagel.model.weights import empty_model, load_model
from bagel.parallel import peer_memory
from bagel.parallel.groups import Groups
from bagel.parallel.hsdp import local
from bagel.parallel.mesh import Mesh
from tests.model.forwards import FORWARDS, denoise_step
from tests.parallel.ranks import Ranks
from tests.shared import MODEL

pytestmark = pytest.mark.slow

ORDER = ("denoise step", "text step", "ViT read", "latents read", "text step", "denoise step")
"""Forwards that use both experts, and such that use one."""
LAYERS = 64
"""Of a model whose layers outweigh the rest."""


def forwards(groups: Groups, dtype: torch.dtype, quantization: Quantization | None, several_hosts: bool) -> list[str]:
    """The forwards in which this rank's part of the model differs from a whole one, in and out of inference mode.

    several_hosts: as if the ranks were on them, and could not read each other's memory.
    """
    load = partial(
        load_model, Checkpoint(MODEL), Role.FULL, delimiter_ids=(3, 4), dtype=dtype, quantization=quantization
    )
    with pytest.MonkeyPatch.context() as patch:
        if several_hosts:
            patch.setattr(peer_memory, "_host", lambda _: ("", str(groups.rank.index)))
        whole, shared = load(), load(groups=groups)
    assert (shared.language_model.layers.stream is None) == several_hosts
    different = []
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            for name in ORDER:
                pairs = zip(FORWARDS[name](shared), FORWARDS[name](whole), strict=True)
                if not all(torch.equal(ours, theirs) for ours, theirs in pairs if theirs is not None):
                    different.append(name)
    return different


@dataclass(frozen=True)
class Bytes:
    """Of a model and one rank's part: the weights, those of one layer, what is read, and the most held at once."""

    whole: int
    layer: int
    mine: int
    read: int
    placing: int
    drawing: int


def measure(groups: Groups) -> Bytes:
    config = Checkpoint(MODEL).config
    config = replace(config, llm=replace(config.llm, num_hidden_layers=LAYERS))
    with most_held() as placing:
        model = empty_model(config, Role.DENOISE, dtype=torch.float32, device="cpu", groups=groups)
    for parameter in model.parameters():
        local(parameter).zero_()
    read = sum(part.target.nbytes for slot in slots(model) if (part := kept(slot)) is not None)
    layer = nbytes(model, "language_model.layers.0.", whole=True)
    whole, mine = nbytes(model, whole=True), nbytes(model)
    stream = model.language_model.layers.stream
    assert stream is not None
    with most_held() as drawing, torch.inference_mode():
        stream.move()
        denoise_step(model)
    return Bytes(whole, layer, mine, read, placing[0], drawing[0])


def nbytes(model: Bagel, prefix: str = "", *, whole: bool = False) -> int:
    named = ((name, each if whole else local(each)) for name, each in model.named_parameters())
    return sum(each.numel() * each.element_size() for name, each in named if name.startswith(prefix))


@contextmanager
def most_held() -> Iterator[list[int]]:
    """The most bytes that PyTorch has allocated at once in the block, beyond those from before."""
    held: list[int] = []
    with torch.profiler.profile(profile_memory=True) as profile:
        yield held
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    sizes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    held.append(max(accumulate(sizes)))


@pytest.mark.parametrize(("world", "shards"), [(4, 2), (3, 3)])
def test_forwards_are_those_of_a_whole_model(world: int, shards: int, ranks: Ranks) -> None:
    """Of two copies of two shards, and of rows that three ranks cannot divide evenly; two ranks have the test below."""
    assert ranks.run(Mesh(data=world), forwards, torch.float32, None, False, weight_ranks=shards) == [[]] * world


@pytest.mark.parametrize("several_hosts", [False, True])
@pytest.mark.parametrize("quantization", [None, Quantization.FP8])
def test_weights_of_several_types_are_divided_too(
    quantization: Quantization | None, several_hosts: bool, ranks: Ranks
) -> None:
    found = ranks.run(Mesh(data=2), forwards, torch.bfloat16, quantization, several_hosts, weight_ranks=2)
    assert found == [[], []]


def test_no_rank_ever_holds_more_than_its_part_and_a_few_layers(ranks: Ranks) -> None:
    for held in ranks.run(Mesh(data=2), measure, weight_ranks=2):
        assert held.mine == held.read < 0.56 * held.whole
        # A layer that computes and one that comes, and what a layer is put together in before the others read it. The
        # other rank's part would be 32 layers more.
        assert held.placing < held.mine + 12 * held.layer
        assert held.drawing < 12 * held.layer
