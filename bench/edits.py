"""The first step of an edit in two stages at the client: of a new image, a known one, and with a known prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.engine.loading import load_role
from bagel.events import PrefillDone, StepDone
from bagel.model.device import choose_dtype
from bagel.pipelines import BAGEL
from bagel.prompts import ImagePart, TextPart
from bagel.request import Modality, PosteriorMode
from bench import cases, peer_omni
from bench.meter import Meter
from bench.report import Table
from bench.stages import MODEL

SIDE, SMALL_SIDE = 1024, 480
"""Of the image on a GPU, and on a CPU, where it is the smallest whose steps begin before all K/V are there."""
LIMIT = 1.15
"""How much later than of a known image the first step of a new one may be done, as a multiple of its prefill alone."""
SETTINGS: dict[str, Any] = {"modality": Modality.IMG2IMG, "steps": 3, "cfg_img_scale": 1.5}
"""Three branches, and two Euler steps."""


def run(device: torch.device, repeats: int, checkpoint: Path | None) -> Iterator[Table]:
    """Measure the prefill alone, then the three kinds of edits in turn; yields one table.

    checkpoint: where not given, the tests' one.
    """
    folder, meter = checkpoint or MODEL, Meter(device)
    side = SIDE if meter.cuda else SMALL_SIDE
    alone = _prefill_ms(folder, meter, side)
    meter.release()
    contexts: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
        # The exact engine, whose prefill was measured.
        services = Deployment(config, folder, logs=nowhere, device=str(device), engine="torch")
        client = stack.enter_context(Client(stack.enter_context(services).address))
        for take in range(repeats + 1):
            file = _file(side, take)
            prompts = {"new image": "a", "known image, new prompt": f"b {take}", "all known": f"b {take}"}
            for name, prompt in prompts.items():
                context, step = _edit(client, prompt, file, launched_ahead=meter.cuda)
                if take:  # the first one only warms up
                    contexts.setdefault(name, []).append(context)
                    steps.setdefault(name, []).append(step)
    known = median(steps["all known"])
    table = Table("edits", f"{side} x {side}, two stages, from the call on; medians of {repeats}; limit {LIMIT:g}")
    for name, each in steps.items():
        step = median(each)
        new = name == "new image"
        ratio = (step - known) / alone if alone and new else None
        table.add(
            case=name,
            contexts_ms=median(contexts[name]),
            first_step_done_ms=step,
            prefill_alone_ms=alone if new else "",
            beyond_known=ratio if new else "",
        )
        table.failed = table.failed or (ratio is not None and ratio > LIMIT)
    yield table


def _prefill_ms(folder: Path, meter: Meter, side: int) -> float | None:
    """Of an edit's image and prompt by the engine alone: median ms of a build that finds nothing in a cache."""
    checkpoint = Checkpoint(folder)
    dtype = getattr(torch, choose_dtype("auto", meter.device))
    loaded = load_role(checkpoint, Role.CONTEXT, dtype=dtype, device=meter.device)
    prompt = ImagePart(cases.noise_image(side), for_generation=True), TextPart("a")
    images = loaded.planner.prepare_images(prompt, PosteriorMode.CONTENT, seed=0)
    chain = loaded.planner.chain(prompt, images)

    return meter.median_ms(cases.build(loaded.model, chain), warmup=2, repeats=5)


def _file(side: int, seed: int) -> bytes:
    """A PNG of its own for each seed."""
    stream = BytesIO()
    peer_omni.picture((side, side), seed).save(stream, "PNG")
    return stream.getvalue()


def _edit(client: Client, prompt: str, file: bytes, *, launched_ahead: bool) -> tuple[float, float]:
    """Milliseconds until the contexts of an edit are there, and until its first step is done.

    launched_ahead: a step is said to be taken when it is launched and the one before it is done, as on a GPU.
    """
    began, seen = time.perf_counter(), dict[object, float]()
    for event in client.stream(prompt, image=file, seed=0, **SETTINGS):
        key = ("step", event.step) if isinstance(event, StepDone) else type(event)
        seen.setdefault(key, 1e3 * (time.perf_counter() - began))
    return seen[PrefillDone], seen["step", 2 if launched_ahead else 1]
