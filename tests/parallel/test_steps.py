"""Steps that several ranks take together: the same pictures as of one rank, from real processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext as nothing
from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import numpy as np
import pytest
import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.loading import LoadedModel, load_role
from bagel.engine.local import BagelEngine
from bagel.engine.memory import kv_space_of
from bagel.engine.sampler import Canvas
from bagel.engine.step_graphs import StepGraphs
from bagel.model import mot
from bagel.parallel.groups import UNDIVIDED, Groups
from bagel.parallel.mesh import Mesh
from bagel.parity.record import Recorder
from bagel.request import ImageSettings, RenormType
from tests.engine.test_sampler import SETTINGS, picture
from tests.engine.test_step_graphs import capturing
from tests.parallel.ranks import Ranks
from tests.shared import MODEL

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """Pictures that are drawn together, the second one from the first one's second step on."""

    grids: tuple[tuple[int, int], ...] = ((5, 7),)
    settings: ImageSettings = SETTINGS
    img: str = "a cup"
    padded: int = 0


CASES = {
    "three branches": Case(),
    "one branch after guidance": Case(settings=replace(SETTINGS, cfg_interval=(0.8, 1.0))),
    "a text scale of 1": Case(settings=replace(SETTINGS, cfg_text_scale=1.0)),
    "an image scale of 1": Case(settings=replace(SETTINGS, cfg_img_scale=1.0)),
    "both scales 1": Case(settings=replace(SETTINGS, cfg_text_scale=1.0, cfg_img_scale=1.0)),
    "equal branches": Case(img="a red cup"),
    "text channels": Case(settings=replace(SETTINGS, cfg_renorm_type=RenormType.TEXT_CHANNEL)),
    "channels": Case(settings=replace(SETTINGS, cfg_renorm_type=RenormType.CHANNEL, cfg_interval=(0.0, 1.0))),
    "two latents": Case(grids=((1, 2),)),
    "ranks that have padding alone": Case(grids=((3, 4),), padded=48),
    "two pictures": Case(grids=((4, 4), (5, 7))),
    "four pictures": Case(grids=((6, 6), (1, 1), (4, 4), (5, 7))),
}
MESHES = [
    *(Mesh(cfg=2), Mesh(cfg=3), Mesh(data=2), Mesh(context=2), Mesh(context=3)),
    *(Mesh(cfg=2, context=2), Mesh(cfg=2, tp=2), Mesh(context=2, tp=2)),
]


@dataclass(frozen=True)
class Drawn:
    """The pictures' latents, the slab at the end, [2, layers, tokens, ...], and the (rows, latents) of each forward."""

    latents: list[np.ndarray]
    slab: np.ndarray
    forwards: list[tuple[int, int]]


def draw(engine: BagelEngine, case: Case, groups: Groups, *, graphs: bool = False) -> Drawn:
    pictures = [picture(engine, grid, seed, case.settings, img=case.img) for seed, grid in enumerate(case.grids)]
    # A number that all meshes of the test divide.
    padded = case.padded or -(-max(each.tokens for each in pictures) // 6) * 6
    space = kv_space_of(engine.model, [each for one in pictures for each in one.kv_tokens(padded)])
    # What was there before must not show, which NaN would.
    space.slab.k.fill_(torch.nan), space.slab.v.fill_(torch.nan)
    over = StepGraphs.over(engine.model, space.slab) if graphs else None
    canvas, latents = Canvas(engine.model, padded, space, over, groups), dict[int, np.ndarray]()
    drawings, forwards = {0: canvas.add(pictures[0])}, []
    with Recorder(engine.model) if not graphs else nothing() as record:
        while len(latents) < len(pictures):
            canvas.step(canvas.drawings)
            if len(drawings) < len(pictures):
                drawings[len(drawings)] = canvas.add(pictures[len(drawings)])
            for index, drawing in drawings.items():
                if drawing.finished and index not in latents:
                    latents[index] = drawing.latents.numpy()
                    canvas.remove(drawing)
        if record is not None:
            forwards = [tuple(each[1].shape[:2]) for each in record.all("decoder.in")]
    slab = torch.stack((space.slab.k, space.slab.v)).numpy()
    return Drawn([latents[index] for index in sorted(latents)], slab, forwards)


@cache
def loaded() -> BagelEngine:
    return BagelEngine.load(Checkpoint(MODEL))


def draw_all(groups: Groups) -> dict[str, Drawn]:
    # Of tensor parallel ranks, each has a model of its own share, which holds these groups.
    engine = loaded() if groups.tp.size == 1 else BagelEngine(load_share(groups))
    return {name: draw(engine, case, groups) for name, case in CASES.items()}


def draw_in_halves(groups: Groups) -> Drawn:
    """As tensor-parallel ranks compute many tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mot, "OVERLAPPED_TOKENS", 2)
        return draw(BagelEngine(load_share(groups)), CASES["three branches"], groups)


def load_share(groups: Groups) -> LoadedModel:
    place, dtype = torch.device("cpu"), torch.float32
    return load_role(Checkpoint(MODEL), Role.FULL, dtype=dtype, device=place, groups=groups)


def draw_with_graphs(groups: Groups) -> Drawn:
    with pytest.MonkeyPatch.context() as patch:
        capturing(loaded().model, patch)
        return draw(loaded(), CASES["four pictures"], groups, graphs=True)


@pytest.fixture(scope="module")
def wanted(engine: BagelEngine) -> dict[str, Drawn]:
    return {name: draw(engine, case, UNDIVIDED) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def drawn_by(ranks: Ranks) -> Callable[[Mesh], list[dict[str, Drawn]]]:
    """What each rank of a mesh draws of all cases, once for all tests here."""
    return cache(lambda mesh: ranks.run(mesh, draw_all))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranks_draw_what_one_rank_draws(
    mesh: Mesh, drawn_by: Callable[[Mesh], list[dict[str, Drawn]]], wanted: dict[str, Drawn]
) -> None:
    by_rank = drawn_by(mesh)
    for name in CASES:
        for drawn in by_rank:
            for ours, first, one in zip(
                drawn[name].latents, by_rank[0][name].latents, wanted[name].latents, strict=True
            ):
                np.testing.assert_allclose(ours, one, atol=2e-5, rtol=0, err_msg=name)
                # To the bit, as latents that drift apart would be those of several pictures.
                assert np.array_equal(ours, first), name
        alone, shape = wanted[name].forwards, [drawn[name].forwards for drawn in by_rank]
        for step, (rows, latents) in enumerate(alone):
            groups = mesh.data * mesh.cfg
            # As much work as a rank's share, and all ranks run each forward.
            shares = {-(-rows // groups), max(1, rows // groups)}
            most = max(share_of(mesh.context, each, latents) for each in shares)
            assert max(forwards[step] for forwards in shape) == most, name
            assert all(len(forwards) == len(alone) for forwards in shape)


def share_of(ranks: int, rows: int, latents: int) -> tuple[int, int]:
    """The rows and latents that each rank of context parallel computes of so many."""
    parts = gcd(rows, ranks)
    return rows // parts, latents * parts // ranks


def test_context_ranks_that_divide_latents_have_the_kv_of_whole_rows(
    drawn_by: Callable[[Mesh], list[dict[str, Drawn]]], wanted: dict[str, Drawn]
) -> None:
    """The padding's too, which attention may read ahead into; and nothing else is written."""
    for drawn in drawn_by(Mesh(context=2)):
        for name in ("three branches", "two latents", "ranks that have padding alone"):
            np.testing.assert_allclose(drawn[name].slab, wanted[name].slab, atol=2e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("mesh", [Mesh(cfg=2), Mesh(context=2)], ids=str)
def test_each_rank_replays_its_part(mesh: Mesh, ranks: Ranks, wanted: dict[str, Drawn]) -> None:
    for drawn in ranks.run(mesh, draw_with_graphs):
        for ours, one in zip(drawn.latents, wanted["four pictures"].latents, strict=True):
            np.testing.assert_allclose(ours, one, atol=2e-5, rtol=0)


def test_tensor_parallel_ranks_add_up_halves(ranks: Ranks, wanted: dict[str, Drawn]) -> None:
    first, second = ranks.run(Mesh(tp=2), draw_in_halves)
    np.testing.assert_allclose(first.latents[0], wanted["three branches"].latents[0], atol=2e-5, rtol=0)
    assert np.array_equal(first.latents[0], second.latents[0])
