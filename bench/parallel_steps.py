"""What ranks take for a picture's steps beside one GPU, and what they keep of the weights; and their bare exchanges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bagel.checkpoint.roles import Role
from bagel.engine.sampler import Canvas
from bagel.model.bagel import Bagel
from bagel.model.naming import slots
from bagel.model.weights import empty_model
from bagel.parallel.groups import UNDIVIDED
from bagel.parallel.hsdp import local, local_rows
from bench import cases
from bench.lab import GIB
from bench.parallel_lab import MOST_ERROR, RankLab, below, distance, equal, judged, velocities
from bench.report import Row, Table

MIB = 2**20
LINKS = (("all-reduce", 28), ("all-reduce", 56), ("all-gather", 8), ("all-gather", 220))
"""Exchanges, and MiB that each rank gives: a layer's outputs of one and two rows of 1024 pixels in tensor parallel, its
latents' K/V in context parallel, half a layer's weights in HSDP."""

LEAST_TIMES = {
    ("cfg 2", 2): 1.9,
    ("cfg 3", 3): 2.7,
    ("context 2", 2): 1.85,
    ("context 2", 1): 1.7,
    ("context 4", 2): 3.2,
    ("context 2 x cfg 2", 2): 3.5,
    ("tensor 2", 2): 1.65,
    ("tensor 4", 2): 2.6,
    ("hsdp 2", 2): 1.7,
}
"""How many times as fast as one GPU a step of the larger picture must be, by mode and branches."""
MOST_WEIGHTS = {"tensor 2": 0.56, "tensor 4": 0.30, "hsdp 2": 0.56}
"""The share of the weights that a rank may keep, by mode."""


def links(lab: RankLab) -> Iterator[Table]:
    """Times of bare exchanges, and whether they bring what the ranks gave."""
    group = lab.groups.world
    table = Table("parallel links", "mib: of each rank, in bfloat16; gb_s: bus bandwidth, as NCCL's tests count it")
    given = torch.arange(1.0, group.size + 1, dtype=torch.bfloat16, device=lab.device)[:, None]
    for what, full in LINKS:
        mib = full if lab.meter.cuda else full / 1024
        reduced = what == "all-reduce"
        exchange, wanted = (group.add_up, given.sum(0)) if reduced else (group.gather, given)
        x = given[group.index].repeat(int(mib * MIB) // given.itemsize)
        right = lab.all_true(bool((exchange(x.clone()) == wanted).all()))
        x.zero_()  # what is added up again and again
        ms = lab.ms(partial(exchange, x), repeats=20)
        passed = x.nbytes * (group.size - 1) * (2 / group.size if reduced else 1)
        row: Row = {"what": what, "mib": mib, "ms": ms, "gb_s": None if ms is None else passed / ms / 1e6}
        judged(table, row, {"wrong values": not right})
    yield table


def whole(lab: RankLab) -> Iterator[Table]:
    """Steps of ranks that have the whole model each."""
    model = lab.model()
    yield from _steps(lab, model, model)


def tensor(lab: RankLab) -> Iterator[Table]:
    """Steps of ranks that have their share of each layer; for one GPU's, each has the whole model too."""
    model, shared = lab.model(), _empty(lab)
    every = {(slot.file, slot.name): slot for slot in slots(model)}
    for slot in slots(shared):
        # The delimiters' rows of the embedding are two slots of one name, whole on every rank.
        if slot.name.endswith("embed_tokens.weight"):
            continue
        part, source = slot.part, every[slot.file, slot.name]
        values = source.target.reshape(source.shape).narrow(part.dimension, part.start, part.stop - part.start)
        slot.target.copy_(values.reshape(slot.target.shape))
    shared.language_model.embed_tokens.weight.copy_(model.language_model.embed_tokens.weight)
    yield _weights(lab, _nbytes(shared), _nbytes(model))
    yield from _steps(lab, model, shared)


def hsdp(lab: RankLab) -> Iterator[Table]:
    """Steps of ranks that divide the weights and the rows; rows that all compute are one GPU's to the bit."""
    model, shared = lab.model(), _empty(lab)
    for ours, theirs in zip(shared.parameters(), model.parameters(), strict=True):
        rows = local_rows(ours)
        local(ours).copy_(theirs[rows.start : rows.stop])
    kept = _nbytes(shared)  # before parameters are pointed to where weights are brought
    if (stream := shared.language_model.layers.stream) is not None:
        stream.move()
    yield _weights(lab, kept, _nbytes(model))
    together = replace(lab.groups, rows=UNDIVIDED.rows)
    for branches in (3, 2, 1) if lab.groups.rows.size > 2 else (2, 1):
        alone = lab.canvas(model, lab.large, branches)
        same = equal(velocities(lab.canvas(shared, lab.large, branches, together)), velocities(alone))
        ranks = lab.canvas(shared, lab.large, branches, lab.groups)
        yield _step(lab, alone, ranks, lab.large, {"other bits of undivided rows": not lab.all_true(same)})


def _empty(lab: RankLab) -> Bagel:
    """A model of the rank's share, without values."""
    sizes = lab.sizes
    return empty_model(sizes.config, Role.DENOISE, dtype=sizes.dtype, device=lab.device, groups=lab.groups).eval()


def _nbytes(model: Bagel) -> int:
    """Bytes of the weights that this rank keeps."""
    return sum(local(each).nbytes for each in model.parameters())


def _weights(lab: RankLab, kept: int, every: int) -> Table:
    share, limit = kept / every, lab.limit(MOST_WEIGHTS.get(lab.mode))
    table = Table(f"parallel {lab.mode}, weights", "what the first rank keeps")
    row = {"gib": kept / GIB, "of_gib": every / GIB, "share": share, "at_most": limit or ""}
    return judged(table, row, {f"above {limit}": below(limit, share)})


def _steps(lab: RankLab, one: Bagel, several: Bagel) -> Iterator[Table]:
    """A branch for each rank that divides rows; of ranks that divide none, two branches and one."""
    branches = lab.groups.rows.size
    shapes = [(lab.large, branches), (lab.small, branches)]
    for side, count in shapes if branches > 1 else [(lab.large, 2), (lab.large, 1), (lab.small, 2)]:
        yield _step(lab, lab.canvas(one, side, count), lab.canvas(several, side, count, lab.groups), side, {})


def _step(lab: RankLab, alone: Canvas, ranks: Canvas, side: int, faults: dict[str, bool]) -> Table:
    """A step of one GPU and of all ranks, in turns. faults: what else is wrong."""
    wanted, ours = velocities(alone), velocities(ranks)
    same, error, most = lab.same_everywhere(ours), distance(ours, wanted), MOST_ERROR[lab.sizes.dtype]
    one_ms, ms = lab.in_turns(cases.first_step(alone), cases.first_step(ranks))
    slowest_ms = lab.slowest(one_ms)
    times = one_ms and ms and one_ms / ms
    limit = lab.limit(LEAST_TIMES.get((lab.mode, len(wanted)))) if side == lab.large else None
    shape: Row = {"side": side, "branches": len(wanted)}
    speed: Row = {"one_gpu_ms": one_ms, "slowest_ms": slowest_ms, "ms": ms, "times": times}
    checked: Row = {"at_least": limit or "", "error": error, "ranks_equal": "yes" if same else "no"}
    faults = faults | {f"below {limit}": below(times, limit), f"error above {most}": not error <= most}
    note = "a step beside the first GPU's own; slowest_ms: that of the slowest GPU; error: of velocities, relative"
    table = Table(f"parallel {lab.mode}", note)
    return judged(table, {**shape, **speed, **checked}, faults | {"ranks differ": not same})
