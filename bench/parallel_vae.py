"""The autoencoder's tiles on several GPUs, beside one GPU that computes them all, and beside the whole picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bagel.model.vae import Vae
from bagel.parallel.groups import ALONE, Group
from bench.lab import GIB
from bench.parallel_lab import RankLab, below, judged
from bench.report import Row, Table

LEAST_TIMES = {2: 1.6}
"""How many times as fast as one GPU's tiles, by ranks."""
TINY_TILE = 64
"""Pixels a side of the tiny autoencoder's tiles, so that its picture has several."""

Way = Callable[[], Tensor | None]


def vae(lab: RankLab) -> Iterator[Table]:
    """Decoding and encoding of the larger picture."""
    for what in ("decode", "encode"):
        yield _measured(lab, what)
        lab.meter.release()


def _measured(lab: RankLab, what: str) -> Table:
    whole, tiles, ranks = ways = _ways(lab, what)
    peaks = [_peak(lab, way) for way in ways]
    one, several = tiles(), ranks()
    assert one is not None
    same = lab.all_true(several is None or torch.equal(several, one))
    finite = lab.all_true(bool(one.isfinite().all()))
    whole_ms, tiles_ms, ms = lab.in_turns(whole, tiles, ranks, repeats=2)
    times, limit = tiles_ms and ms and tiles_ms / ms, lab.limit(LEAST_TIMES.get(lab.groups.world.size))
    speed: Row = {"side": lab.large, "whole_ms": whole_ms, "tiles_ms": tiles_ms, "ms": ms}
    ratios: Row = {"times_of_whole": whole_ms and ms and whole_ms / ms, "times": times, "at_least": limit or ""}
    memory: Row = dict(zip(("whole_gib", "tiles_gib", "gib"), peaks, strict=True))
    table = Table(f"parallel {lab.mode}, {what}", "float32; times: beside one GPU's tiles; gib: beyond the weights")
    faults = {f"below {limit}": below(times, limit), "not one GPU's tiles": not same, "not finite": not finite}
    return judged(table, {**speed, **ratios, **memory, "equal": "yes" if same else "no"}, faults)


def _peak(lab: RankLab, way: Way) -> float | None:
    """GiB that the rank with the most holds at once, beyond what was there."""
    before = lab.meter.allocated()
    lab.meter.reset_peak()
    way()
    mine = torch.tensor([(lab.meter.peak() or before) - before], device=lab.device)
    most = int(lab.groups.world.gather(mine).max())
    return most / GIB if lab.meter.cuda else None


def _ways(lab: RankLab, what: str) -> tuple[Way, Way, Way]:
    """One picture whole, in tiles of one rank and in tiles of all; what a rank has of it, None if another has it."""
    config, groups = lab.sizes.config.vae, lab.groups
    torch.manual_seed(0)  # the same weights and picture on every rank
    with torch.device(lab.device):
        whole = Vae(config, encoder=what == "encode", decoder=what == "decode").eval().requires_grad_(False)
        latents = torch.randn(1, config.z_channels, lab.large // 8, lab.large // 8)
        pixels = torch.rand(1, 3, lab.large, lab.large) * 2 - 1
    if not lab.meter.cuda:
        whole.autoencoder.tile_sample_min_size, whole.autoencoder.tile_latent_min_size = TINY_TILE, TINY_TILE // 8
    tiles, ranks = copy.copy(whole), copy.copy(whole)  # with the same weights
    tiles.use_tiling()
    ranks.use_tiling(groups.vae_decode, groups.vae_encode)

    def work(vae: Vae, group: Group) -> Tensor | None:
        if what == "encode":
            return torch.cat(vae.encode(pixels), dim=1)
        if group.index == 0:
            return vae.decode(latents)
        vae.help_decode(latents)
        return None

    return partial(work, whole, ALONE), partial(work, tiles, ALONE), partial(work, ranks, groups.vae_decode)
