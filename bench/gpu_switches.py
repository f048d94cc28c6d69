"""What each optimisation of a picture's step gains: the same steps, with one of them switched off at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from bagel.checkpoint.roles import Role
from bagel.model.backend import LayerBackend
from bagel.model.products import whole_product
from bagel.model.streams import one_by_one
from bench import cases
from bench.lab import Lab
from bench.report import Table

SWITCHES: Mapping[str, Callable[[LayerBackend], LayerBackend]] = {
    "nothing": lambda backend: backend,
    "two streams": lambda backend: replace(backend, run_both=one_by_one),
    "whole waves": lambda backend: replace(backend, product=whole_product),
    "graphs": lambda backend: replace(backend, captures=False),
    "enforce_eager": lambda backend: LayerBackend(backend.attend, attention=backend.attention),
}
"""Backends by what they go without."""


def switches(lab: Lab) -> Iterator[Table]:
    """Role denoise: single steps of pictures of half the smallest size up to the largest."""
    table = Table("gpu switches", "one step of one picture; off: what it goes without; host_ms: until the call returns")
    with lab.model(Role.DENOISE) as model:
        decoder, chosen = model.language_model, model.language_model.backend
        for side in (lab.sizes.sides[0] // 2, *lab.sizes.sides):
            for branches in cases.SETTINGS:
                contexts = cases.branch_contexts(model, cases.PROMPT, branches)
                for off, switched in SWITCHES.items():
                    decoder.backend = switched(chosen)
                    work = cases.first_step(cases.draw(model, side, contexts))
                    ms, host = lab.meter.median_ms(work, repeats=20), lab.meter.host_ms(work)
                    table.add(size=side, branches=branches, off=off, ms=ms, host_ms=host)
        decoder.backend = chosen
    yield table
