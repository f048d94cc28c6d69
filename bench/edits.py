"""The first step of an edit in two stages at the client: of a new image, a known one, and with a known prompt."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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
from bagel.errors import BagelError
from bagel.events import Accepted, PrefillDone, StepDone
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
"""When the first step of a new image may begin, as a multiple of its prefill alone; and how much later than that of a
known one it may be done."""
LOG_S = 10.0
"""Longest wait for a line of a service's log."""
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
    edits: dict[str, list[_Edit]] = {}
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bagel-edits-"))) / "log"
        logs = stack.enter_context(log.open("w", encoding="utf-8"))
        config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
        # The exact engine, whose prefill was measured.
        services = Deployment(config, folder, logs=logs, device=str(device), engine="torch")
        client = stack.enter_context(Client(stack.enter_context(services).address))
        for take in range(repeats + 1):
            file = _file(side, take)
            prompts = {"new image": "a", "known image, new prompt": f"b {take}", "all known": f"b {take}"}
            for name, prompt in prompts.items():
                edit = _edit(client, prompt, file, log, launched_ahead=meter.cuda)
                if take:  # the first one only warms up
                    edits.setdefault(name, []).append(edit)
    yield _table(side, repeats, alone, edits)


@dataclass(frozen=True)
class _Edit:
    """Milliseconds from the call on: until the contexts are computed, the first step begins, and is done."""

    contexts: float
    begins: float
    done: float


def _table(side: int, repeats: int, alone: float | None, edits: dict[str, list[_Edit]]) -> Table:
    known = median(edit.done for edit in edits["all known"])
    table = Table("edits", f"{side} x {side}, two stages, from the call on; medians of {repeats}; limit {LIMIT:g}")
    for name, each in edits.items():
        begins, done = median(edit.begins for edit in each), median(edit.done for edit in each)
        new = name == "new image"
        ratios = (begins / alone, (done - known) / alone) if alone and new else (None, None)
        table.add(
            case=name,
            contexts_ms=median(edit.contexts for edit in each),
            first_step_begins_ms=begins,
            first_step_done_ms=done,
            prefill_alone_ms=alone if new else "",
            begins_of_prefill=ratios[0] if new else "",
            beyond_known=ratios[1] if new else "",
        )
        table.failed = table.failed or any(ratio is not None and ratio > LIMIT for ratio in ratios)
    return table


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


def _edit(client: Client, prompt: str, file: bytes, log: Path, *, launched_ahead: bool) -> _Edit:
    """What happens in an edit.

    launched_ahead: a step is said to be taken when it is launched and the one before it is done, as on a GPU.
    """
    # The clock of the log's times too.
    began, seen, request = time.monotonic(), dict[object, float](), ""
    for event in client.stream(prompt, image=file, seed=0, **SETTINGS):
        key = ("step", event.step) if isinstance(event, StepDone) else type(event)
        seen.setdefault(key, 1e3 * (time.monotonic() - began))
        request = event.request_id if isinstance(event, Accepted) else request
    begins = 1e3 * (_first_step_at(log, request) - began)
    return _Edit(seen[PrefillDone], begins, seen["step", 2 if launched_ahead else 1])


def _first_step_at(log: Path, request: str) -> float:
    """When a request's first step began, by the DiT's log and time.monotonic."""
    limit = time.monotonic() + LOG_S
    while time.monotonic() < limit:
        lines = (line.partition(" | ")[2] for line in log.read_text(encoding="utf-8").splitlines())
        for told in (json.loads(line) for line in lines if "contexts landed" in line and request in line):
            return float(told["first_step_at"])
        time.sleep(0.05)
    raise BagelError(f"the DiT has not logged when the first step of request {request} began")
