"""The CPU benchmark: denoise steps and context building, each compared with its bare control (see control.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from bagel.checkpoint.config import ModelConfig
from bagel.checkpoint.roles import Role
from bagel.engine.segments import Chain
from bagel.errors import ConfigError
from bagel.kv.digests import SegmentKind
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_pixels
from bagel.model.weights import random_model
from bench import cases, control
from bench.models import MID, TINY
from bench.report import Table
from bench.timing import Work, compare

Pair = tuple[Work, Work]
Case = Callable[[Bagel], Pair]

NOTE = "float32; medians of interleaved samples; ratios of wall time (with quartiles over pairs) and of CPU-seconds"


def run(only: str, repeats: int) -> Iterator[Table]:
    """Measure every case whose name contains `only`; yields a table for each model.

    Raises ConfigError if no name does, or for fewer than two repeats.
    """
    if not any(only in name for name in case_names()):
        raise ConfigError(f"--only {only!r} names no row; the rows are: {'; '.join(case_names())}")
    if repeats < 2:
        raise ConfigError(f"--repeats is {repeats}; quartiles need at least 2")
    for title, config, chosen in _cases(only):
        table = Table(f"cpu, {title}", NOTE)
        # Random weights take as long as trained ones.
        model = random_model(config, Role.FULL, dtype=torch.float32, device="cpu", seed=0)
        for name, case in chosen.items():
            _measure(table, name, case(model), repeats)
        yield table


def case_names() -> list[str]:
    """Names of all cases."""
    return [name for _, _, chosen in _cases("") for name in chosen]


def _measure(table: Table, name: str, pair: Pair, repeats: int) -> None:
    result = compare(*pair, repeats)
    low, high = result.spread
    table.add(
        case=name,
        ours_ms=1e3 * result.ours_s,
        control_ms=1e3 * result.control_s,
        ratio=result.ratio,
        quartiles=f"{low:.2f} to {high:.2f}",
        cpu_ratio=result.cpu_ratio,
        samples=len(result.ours),
    )


def _cases(only: str) -> Iterator[tuple[str, ModelConfig, Mapping[str, Case]]]:
    """The name, the shape and the cases of each model that has a case whose name contains `only`."""
    mid: dict[str, Case] = {
        "mid step, text-to-image 512, 1 branch": partial(_step, side=512, tokens=30, branches=1),
        "mid step, text-to-image 512, 2 branches": partial(_step, side=512, tokens=30, branches=2),
        "mid step, edit 512, 1300 tokens, 3 branches": partial(_step, side=512, tokens=1300, branches=3),
        "mid context, text of 256 tokens": partial(_text_context, tokens=256),
        "mid context, ViT block of 512": partial(_vit_context, side=512),
        "mid context, VAE block of 512 (decoder)": partial(_vae_context, side=512),
    }
    tiny: dict[str, Case] = {
        "tiny step, text-to-image 64, 2 branches": partial(_step, side=64, tokens=30, branches=2),
        "tiny step, text-to-image 128, 2 branches": partial(_step, side=128, tokens=30, branches=2),
        "tiny step, edit 128, 300 tokens, 3 branches": partial(_step, side=128, tokens=300, branches=3),
        "tiny context, text of 32 tokens": partial(_text_context, tokens=32),
    }
    for title, config, chosen in (("mid-size model", MID, mid), ("tiny model", TINY, tiny)):
        picked = {name: case for name, case in chosen.items() if only in name}
        if picked:
            yield title, config, picked


def _step(model: Bagel, *, side: int, tokens: int, branches: int) -> Pair:
    canvas = cases.draw(model, side, cases.branch_contexts(model, tokens, branches))
    lengths = cases.branch_lengths(tokens, branches)
    return cases.first_step(canvas), control.denoise_step(model, lengths, canvas.drawings[0].picture.tokens)


def _text_context(model: Bagel, *, tokens: int) -> Pair:
    return cases.build(model, cases.text_chain(tokens)), control.text_segment(model, tokens)


def _vit_context(model: Bagel, *, side: int) -> Pair:
    chain = cases.image_chain(model.config, side, SegmentKind.VIT)
    return cases.build(model, chain), control.vit_block(model, chain.length - 2)


def _vae_context(model: Bagel, *, side: int) -> Pair:
    """A VAE block without the encoder, which is diffusers' and has no control."""
    chain = cases.image_chain(model.config, side, SegmentKind.VAE)
    model.vae = cases.EncodedVae(model.autoencoder(), _pixels(chain))
    return cases.build(model, chain), control.vae_block(model, chain.length - 2)


def _pixels(chain: Chain) -> torch.Tensor:
    image = chain.segments[0].image
    assert image is not None
    return to_pixels(image)[None]
