"""Ours beside vllm-omni: the same requests on the same checkpoint, each as a single stage, at the client."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL.Image import Image

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.errors import ConfigError
from bagel.pipelines import BAGEL_SINGLE_STAGE
from bench import peer_omni, random_checkpoint
from bench.models import TINY
from bench.report import Table

RUNS = 2
PEER_TIMEOUT_S = 1200.0
GUIDANCE: Mapping[str, Any] = {
    "cfg_text_scale": 4.0,
    "cfg_interval": (0.4, 1.0),
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One kind of request; steps: timesteps."""

    name: str
    side: int
    steps: int
    edit: bool = False

    @property
    def guidance(self) -> dict[str, Any]:
        """An edit has three branches where guidance is on, a text-to-image two."""
        return {**GUIDANCE, "cfg_img_scale": 1.5 if self.edit else 1.0}

    @property
    def prompt(self) -> str:
        return "make it a blue dress" if self.edit else "a red cat on a sofa near the window"


FULL = (
    Case("text-to-image 512, 20 timesteps", 512, 20),
    Case("text-to-image 1024, 50 timesteps", 1024, 50),
    Case("edit 1024, 50 timesteps", 1024, 50, edit=True),
)
SMALL = (Case("text-to-image 64, 4 timesteps", 64, 4), Case("edit 64, 4 timesteps", 64, 4, edit=True))
ATTENTION = re.compile(r"diffusion attention backend '(\w+)'")
"""Of the peer's log: without its best attention it would not be what it can be."""
WARM_UP = 4
"""Timesteps of a first request of each kind, which is not counted."""


def run(
    device: torch.device, only: str, *, tiny: bool, checkpoint: Path | None, python: Path | None
) -> Iterator[Table]:
    """Measure ours, then the peer's where `python` has vllm_omni; yields one table.

    checkpoint: a folder that is there already; else one of random weights is made, and removed afterwards.
    """
    cases = [case for case in (SMALL if tiny else FULL) if only in case.name]
    if not cases:
        raise ConfigError(f"--only {only!r} names no row; the rows are: {'; '.join(case.name for case in FULL)}")
    with ExitStack() as stack:
        folder = checkpoint or made(stack, device, tiny=tiny)
        ours = _ours(folder, device, cases)
        theirs, why = _theirs(folder, python, cases)
    note = f"single stage, one request at a time, a new picture for each edit; medians of {RUNS} at the client; {why}"
    table = Table("peer", note)
    for case in cases:
        mine, other = median(ours[case.name]), median(theirs[case.name]) if theirs.get(case.name) else None
        table.add(case=case.name, ours_s=mine, vllm_omni_s=other, ratio=other and other / mine)
    yield table


def requests(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What both sides are sent, in order: of each case a warm-up, then the runs, each with a seed of its own."""
    return [
        {
            "case": case.name if take else "",
            "side": case.side,
            "steps": case.steps if take else min(WARM_UP, case.steps),
            "seed": 100 * number + take,
            "edit": case.edit,
            "prompt": case.prompt,
            "guidance": case.guidance,
        }
        for number, case in enumerate(cases, 1)
        for take in range(RUNS + 1)
    ]


def made(stack: ExitStack, device: torch.device, *, tiny: bool) -> Path:
    """A checkpoint that goes with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bagel-bench-")))
    began = time.perf_counter()
    random_checkpoint.make(folder, TINY if tiny else BAGEL_7B_MOT, device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"made a checkpoint of {size / 1e9:.3g} GB in {time.perf_counter() - began:.1f} s", flush=True)
    return folder


def _ours(folder: Path, device: torch.device, cases: Sequence[Case]) -> dict[str, list[float]]:
    """Seconds of each run, by case."""
    config = load_deploy_config(shipped_deploy_config(BAGEL_SINGLE_STAGE.model_type))
    seconds: dict[str, list[float]] = {}
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, folder, device=str(device), logs=nowhere) as services,
        Client(services.address) as client,
    ):
        for case, taken, _ in answers(client, cases):
            seconds.setdefault(case, []).append(taken)
    return seconds


def answers(client: Client, cases: Sequence[Case], **options: Any) -> Iterator[tuple[str, float, Image]]:
    """The case of each request, nothing of a warm-up, its seconds and its picture. options: of all requests."""
    for request in requests(cases):
        arguments = _arguments(request)
        began = time.perf_counter()
        picture = client.generate(**arguments, **options).image
        taken = time.perf_counter() - began
        assert picture is not None
        yield request["case"], taken, picture


def _arguments(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as the client takes it."""
    side, seed = request["side"], request["seed"]
    arguments = {"prompt": request["prompt"], "seed": seed, "steps": request["steps"], **request["guidance"]}
    if request["edit"]:
        return arguments | {"modality": "img2img", "image": peer_omni.picture((side, side), seed)}
    return arguments | {"height": side, "width": side}


def _theirs(folder: Path, python: Path | None, cases: Sequence[Case]) -> tuple[dict[str, list[float]], str]:
    """Seconds of each run of the peer, by case, and what the table says of it: its version, or why it has none."""
    if python is None:
        return {}, "vllm-omni not run: --peer-python names the Python of an environment that has it"
    try:
        told = subprocess.run([python, "-c", "import vllm_omni"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--peer-python {python} cannot be run: {error.strerror}") from None
    if told.returncode:
        return {}, f"vllm-omni not run: {python} cannot import it ({_last(told.stderr)})"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(requests(cases), file)
        file.flush()
        command = [str(python), peer_omni.__file__, str(folder), file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PEER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {}, f"vllm-omni not measured: it was not done after {PEER_TIMEOUT_S:g} s"
    seconds, about = dict[str, list[float]](), "vllm-omni"
    for line in done.stdout.splitlines():
        if line.startswith(peer_omni.TAG):
            values = json.loads(line.removeprefix(peer_omni.TAG))
            if "version" in values:
                about = f"vllm-omni {values['version']}, started in {values['start_s']:.0f} s"
                if attention := ATTENTION.search(done.stdout + done.stderr):
                    about += f", attention {attention[1]}"
            else:
                seconds.setdefault(values["case"], []).append(values["seconds"])
    if done.returncode:
        about += f", which failed ({_last(done.stderr)})"
    return seconds, about


def _last(text: str) -> str:
    """The last line of an error."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"
